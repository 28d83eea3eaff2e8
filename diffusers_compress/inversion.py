"""Prompts found by inversion, and the likeness of pictures, by a CLIP model of open_clip."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm


def load_inverter(
    name: str, device: str = "cpu", tokens: int = 16, steps: int = 1000, lr: float = 0.1, weight_decay: float = 0.1, seed: int = 0
) -> Callable[[list], list[list[int]]]:
    """A function from PIL pictures to token ids of CLIP's vocabulary, see `invert`; what Stable Diffusion 1.x and 2.x number their
    tokens by. It shows a bar for each picture.

    `name`: "MODEL/PRETRAINED" of open_clip. Stable Diffusion 1.x was trained with "ViT-L-14/openai", 2.x with
    "ViT-H-14/laion2b_s32b_b79k". Published: 16 tokens, 3000 steps.
    """
    model, encode, begin, end = _load(name, device)

    def prompts(pictures):
        found = []
        for picture in pictures:
            with tqdm(total=steps, desc="inversion") as bar:
                ids, _ = invert(model, encode(picture), begin, end, tokens, steps, lr, weight_decay, seed, bar)
            found.append(ids)
        return found

    return prompts


def load_similarity(name: str, device: str = "cpu") -> Callable[[object, object], float]:
    """A function of two PIL pictures: the cosine of their features, of "MODEL/PRETRAINED" of open_clip."""
    _, encode, _, _ = _load(name, device)
    return lambda one, other: float(F.cosine_similarity(encode(one), encode(other)))


def _load(name: str, device: str):
    """The model, a function from a PIL picture to its features [1, D], and the tokens that begin and end a text."""
    import open_clip

    model_name, _, pretrained = name.partition("/")
    model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained or None, device=device)
    tokenizer = open_clip.get_tokenizer(model_name)
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(picture):
        return model.encode_image(transform(picture.convert("RGB"))[None].to(device))

    return model, encode, tokenizer.sot_token_id, tokenizer.eot_token_id


def invert(
    model: Any,
    target: Tensor,
    begin: int,
    end: int,
    tokens: int = 16,
    steps: int = 1000,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    seed: int = 0,
    bar: tqdm | None = None,
) -> tuple[list[int], list[float]]:
    """Token ids whose text a CLIP model finds most like `target` [1, D], and the best similarity after each step.

    Wen et al. 2023, Hard Prompts Made Easy (PEZ), algorithm 1: an embedding of each token is moved by the gradient at the nearest
    token's embedding. The best ids that were met are kept.
    """
    table = getattr(model, "text", model).token_embedding.weight.detach().float()
    directions = F.normalize(table, dim=1)
    directions[[begin, end]] = 0  # nearest to nothing
    start = torch.randint(len(table), (tokens,), generator=torch.Generator().manual_seed(seed)).to(table.device)
    moved = nn.Parameter(table[start].clone())
    optimizer = torch.optim.AdamW([moved], lr=lr, weight_decay=weight_decay)
    best, history = (-2.0, []), []
    for _ in range(steps):
        ids = (F.normalize(moved.detach(), dim=1) @ directions.T).argmax(1)
        similarity, gradient = _similarity(model, target, ids, begin, end)
        best = max(best, (similarity, ids.tolist()))
        history.append(best[0])
        moved.grad = -gradient
        optimizer.step()
        if bar is not None:
            bar.update()
            bar.set_postfix(similarity=f"{best[0]:.3f}")
    return best[1], history


def _similarity(model: Any, target: Tensor, ids: Tensor, begin: int, end: int) -> tuple[float, Tensor]:
    """The cosine of the text's features and the target's, and its gradient by the embeddings of the ids, [tokens, width]."""
    text = torch.zeros(1, model.context_length, dtype=torch.long, device=ids.device)
    text[0, : len(ids) + 2] = torch.cat([ids.new_tensor([begin]), ids, ids.new_tensor([end])])
    embedded: list[Tensor] = []

    def watch(module, inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = getattr(model, "text", model).token_embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            similarity = F.cosine_similarity(model.encode_text(text).float(), target.float())[0]
            (gradient,) = torch.autograd.grad(similarity, embedded)
    finally:
        hook.remove()
    return similarity.item(), gradient[0, 1 : len(ids) + 1].float()
