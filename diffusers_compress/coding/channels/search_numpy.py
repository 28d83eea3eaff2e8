"""The M-algorithm of `search` on the CPU, wherever the scores are: it looks only at the candidates that may be among the best."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.coding.channels import search

SAMPLED = 16  # one message of so many says what total the best candidates have
MARGIN = 1.2  # and is believed within this factor of their number


def survivors(bits: list[int], scores: Iterable[Tensor], followed: int) -> tuple[Tensor, list[Tensor]]:
    """As `search.m_algorithm` wants it."""
    each, ends, kept = (score for run in scores for score in run.cpu().numpy().swapaxes(0, 1)), [], []
    for width, score in zip(bits, each):
        ends = ends or [(np.zeros(1, np.float32), np.zeros(1, np.uint32))] * len(score)
        steps = [_step(total, state, own, width, followed) for (total, state), own in zip(ends, score)]
        ends = [(total, state) for total, state, _ in steps]
        kept.append(torch.from_numpy(np.stack([chosen for _, _, chosen in steps])))
    return torch.from_numpy(np.stack([total for total, _ in ends])), kept


def _step(total: np.ndarray, state: np.ndarray, score: np.ndarray, width: int, followed: int) -> tuple[np.ndarray, ...]:
    """The best messages through a segment: (total float32, state uint32, what was chosen int64), [M] each, from those of the segment before
    it and the scores of all windows."""
    state = state << width
    window = search.place(state)
    rows, row = score.reshape(-1, 2**width), (window >> width).astype(np.intp)
    count, most = min(followed, len(total) << width), _largest_of_rows(score, width)
    for least in (_rough(total, rows, row, count), -np.inf):
        likely = np.flatnonzero(most.take(row) + total >= least)  # messages that a candidate so good may continue
        candidates = rows.take(row.take(likely), 0)
        candidates += total.take(likely)[:, None]
        found = np.flatnonzero(candidates >= least)
        if len(found) >= count:
            break
    totals = candidates.ravel().take(found)
    best = totals.argpartition(-count)[-count:]
    total, best = totals.take(best), found.take(best)
    parent = likely.take(best >> width)
    way = (best ^ window.take(parent)) & 2**width - 1
    return total, state.take(parent) | way.astype(np.uint32), parent << width | way


def _rough(total: np.ndarray, rows: np.ndarray, row: np.ndarray, count: int) -> float:
    """A total that somewhat more than `count` candidates have at least, most likely."""
    sample = (rows.take(row[::SAMPLED], 0) + total[::SAMPLED, None]).ravel()
    wanted = int(MARGIN * count * len(sample) / (len(total) * rows.shape[1])) + 1
    return np.partition(sample, -wanted)[-wanted] if wanted < len(sample) else -np.inf


def _largest_of_rows(score: np.ndarray, width: int) -> np.ndarray:
    """The largest of each 2^width scores that lie side by side."""
    for shift in range(width):
        score = np.maximum(score[: -(2**shift)], score[2**shift :])
    return score[:: 2**width]
