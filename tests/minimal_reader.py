"""A reader of .dfc files written from FORMAT.md alone, with the standard library and nothing of the package: a second opinion.

As slow as it is plain. It goes as far as integers go: to the messages and timesteps of a DiffC file, to the samples that the messages stand
for, to all symbols of a Relic or CDC file, to the grid and caption of a PerCo file, to the offsets of a UQDM file, given the rows of its
tables, and to the pixels of a lossless file, given its prediction.
"""

import functools
import json
import math
import struct
import zlib
from statistics import NormalDist


class Refused(Exception):
    """By FORMAT.md this file is none that can be read."""


def need(condition, words):
    if not condition:
        raise Refused(words)


# ---------------------------------------------------------------------------------------------------------------- container


def crc16(data):
    crc = 0xFFFF
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


def varint(data, position):
    value = 0
    for i in range(5):
        need(position + i < len(data), "cut in a number")
        byte = data[position + i]
        value += (byte & 127) << 7 * i
        if byte < 128:
            need(byte or not i, "not the shortest form")
            return value, position + i + 1
    raise Refused("a number of more than five bytes")


def container(data):
    """(codec, width, height, fingerprint, parameters, offset of the payload)."""
    need(data[:1] == b"\xdf" and data[1:2] in (b"", b"\xc1"), "magic or version")
    need(len(data) > 2, "cut")
    width, position = varint(data, 3)
    height, position = varint(data, position)
    fingerprint = data[position : position + 4]
    length, position = varint(data, position + 4)
    end = position + length
    need(len(data) >= end + 2, "cut")
    need(struct.unpack_from("<H", data, end)[0] == crc16(data[:end]), "header checksum")
    need(width and height, "no pixels")
    return data[2], width, height, fingerprint, data[position:end], end + 2


def payload_of(data, start, length):
    """(payload, whether the file is whole)."""
    if len(data) < start + length + 4:
        return data[start : start + length], False
    need(len(data) == start + length + 4, "too long")
    need(struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4]), "checksum")
    return data[start:-4], True


class Bits:
    def __init__(self, data):
        self.digits, self.position = "".join(f"{byte:08b}" for byte in data), 0

    def left(self):
        return len(self.digits) - self.position

    def read(self, count):
        need(count <= self.left(), "parameters end early")
        self.position += count
        return int(self.digits[self.position - count : self.position] or "0", 2)


# -------------------------------------------------------------------------------------------------------- common randomness

MASK = 0xFFFFFFFF
START, PERMUTATION, SIGNS, CODEBOOK, CANDIDATES, DITHER, CHECK = 0, 1, 2, 3, 4, 6, 7


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & MASK, p >> 32 ^ c[3] ^ k[1], p & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return c


def words(count, stream, step=0, first=0):
    found = []
    for i in range(first // 4, (first + count + 3) // 4):
        found += philox((i & MASK, step, stream, i >> 32), (0x44696666, 0x436F6D70))
    return found[first % 4 : first % 4 + count]


_upper = [round(NormalDist().inv_cdf((i + 0.5) / 65536) * 65536) for i in range(32768, 65536)]
NORMALS = [-x for x in reversed(_upper)] + _upper


def normals(count, stream, step=0, first=0):
    """As integers, times 2^16."""
    found = []
    for word in words((first + count + 1) // 2 - first // 2, stream, step, first // 2):
        found += [NORMALS[word & 0xFFFF], NORMALS[word >> 16]]
    return found[first % 2 : first % 2 + count]


def permutation(n, step):
    word = words(n, PERMUTATION, step)
    return sorted(range(n), key=lambda i: (word[i], i))


def signs(n, step, stream=SIGNS):
    word = words((n + 31) // 32, stream, step)
    return [-1 if word[i // 32] >> i % 32 & 1 else 1 for i in range(n)]


# -------------------------------------------------------------------------------------------------------------- range decoder


class RangeDecoder:
    def __init__(self, data, padding=0):
        self.data, self.padding, self.position = data, padding, 8
        self.low, self.range, self.point = 0, 2**64 - 1, self.bytes(0, 8)

    def bytes(self, start, count):
        return int.from_bytes(
            bytes(self.data[start + i] if start + i < len(self.data) else self.padding for i in range(count)), "big"
        )

    def symbol(self, left):
        """The i with left_i <= u < left_(i+1)."""
        scale = self.range >> 24
        u = (self.point - self.low) % 2**64 // scale
        need(u < 2**24, "no symbol")
        i = max(i for i in range(len(left) - 1) if left[i] <= u)
        self.low = (self.low + scale * left[i]) % 2**64
        self.range = scale * (left[i + 1] - left[i])
        if self.range < 2**32:
            self.low, self.range = self.low << 32 & 2**64 - 1, self.range << 32
            self.point = (self.point << 32 | self.bytes(self.position, 4)) & 2**64 - 1
            self.position += 4
        return i

    def under(self, frequencies):
        m, share = len(frequencies), (2**24 - len(frequencies)) / float(sum(frequencies))
        before = [sum(frequencies[:i]) for i in range(m)]
        return self.symbol([math.floor(before[i] * share) + i for i in range(m)] + [2**24])

    def equal(self, bits):
        """Without a list of all 2^bits symbols."""
        if not bits:
            return 0
        scale = self.range >> 24
        u = (self.point - self.low) % 2**64 // scale
        need(u < 2**24, "no symbol")
        i = u >> 24 - bits
        self.symbol([0, i << 24 - bits, i + 1 << 24 - bits, 2**24][i == 0 :])
        return i


# --------------------------------------------------------------------------------------------------------------------- DiffC


def number(rank, p):
    h = 2 ** (p - 1)
    return rank if rank < h else h + rank % h << rank // h - 1


def rice(bits, parameter=1):
    ones = 0
    while bits.left():
        if bits.read(1) == 0:
            return ones << parameter | bits.read(parameter) if bits.left() >= parameter else None
        ones += 1
    return None


def diffc_parameters(data):
    bits, check = Bits(data), None
    channel = bits.read(2)
    if channel == 0:
        channel = bits.read(2)
        need(channel, "channel")  # a longer number is that of a channel to come
        check = bits.read(14)
    prompt = bytes(bits.read(8) for _ in range(bits.read(16))).decode() if bits.read(1) else ""
    budget = number(bits.read(9), 5)
    last = bits.read(len(f"{budget:b}") if budget else 0)
    need(last <= budget, "last budget")
    ranks = [bits.read(8)] if bits.left() >= 8 else []
    while ranks and (v := rice(bits)) is not None:
        ranks.append(ranks[-1] + (v // 2 if v % 2 == 0 else -(v + 1) // 2))
    need(all(1 <= rank <= 255 for rank in ranks), "stride")
    strides = [number(rank, 4) for rank in ranks]
    budgets = [budget] * (len(strides) - 1) + [last] if strides else []
    return {"channel": channel, "check": check, "prompt": prompt, "budgets": budgets, "strides": strides}


def diffc(data):
    """All of a DiffC file: its parameters, and under "messages" those that are there."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec == 1, "codec")
    facts = {"width": width, "height": height, "fingerprint": fingerprint.hex(), **diffc_parameters(parameters)}
    budgets = facts["budgets"]
    trellis = facts["channel"] in (1, 3)
    length = -(-sum(budgets) // 8) if trellis else 3 + int.from_bytes(data[start : start + 3], "little")
    payload, facts["complete"] = payload_of(data, start, length)
    facts["messages"] = trellis_messages(payload, budgets) if trellis else poisson_messages(payload[3:], budgets)
    return facts


def trellis_messages(payload, budgets):
    digits, messages = "".join(f"{byte:08b}" for byte in payload), []
    for budget in budgets:
        if budget > len(digits):
            break
        messages.append([int(digit) for digit in digits[:budget]])
        digits = digits[budget:]
    return messages


def chunk_bits(budget):
    chunks = max(1, -(-budget // 14))
    return [budget * (c + 1) // chunks - budget * c // chunks for c in range(chunks)]


def poisson_messages(stream, budgets):
    readers, messages = [RangeDecoder(stream, 0x00), RangeDecoder(stream, 0xFF)], []
    for budget in budgets:
        message = []
        for q in chunk_bits(budget):
            try:
                index, other = (poisson_index(reader, q) if budget else 0 for reader in readers)
            except Refused:
                return messages
            if index != other:
                return messages
            message.append(index)
        messages.append(message)
    return messages


@functools.cache
def octaves(q):
    root = 2 * q + 3
    r = next(r for r in range(2**16, 0, -1) if r**root <= 2 ** (16 * root - 2))
    return [65536 * r**o // 65536**o for o in range(q + 2)]


def poisson_index(reader, q):
    o = reader.under(octaves(q))
    return 2**o - 1 + reader.equal(o)


def timesteps(strides, ratio):
    found, total = [len(ratio) - 1], 0
    for stride in strides:
        need(found[-1] > 0, "no room for a step")
        total += stride
        wanted = ratio[-1] + total / 1024
        nearest = min(range(len(ratio)), key=lambda t: (abs(ratio[t] - wanted), t))
        found.append(max(0, min(nearest, found[-1] - 1)))
    return found


def ratios(rescaled=False):
    """alpha / sigma of Stable Diffusion's "scaled_linear" from 0.00085 to 0.012 over 1000 timesteps, or that with zero terminal SNR."""
    f32 = lambda x: struct.unpack("<f", struct.pack("<f", x))[0]  # noqa: E731
    first, last, product, alphas = f32(math.sqrt(0.00085)), f32(math.sqrt(0.012)), 1.0, []
    for t in range(1000):
        root = f32(first + (last - first) / 999 * t)
        product *= f32(1 - f32(root * root))
        alphas.append(f32(product))
    if rescaled:
        c = [math.sqrt(alpha) for alpha in alphas]
        alphas = [((x - c[-1]) * c[0] / (c[0] - c[-1])) ** 2 for x in c]
    alphas = [max(alpha, 2.0**-24) for alpha in alphas]
    if alphas[-1] > 2.0**-24:
        alphas[-1] = 0.0
    return [math.sqrt(alpha / (1 - alpha)) for alpha in alphas]


def expected_error(ratio, channels, h, w):
    """e_i at a noise level, of a model without calibration, in double precision."""

    def frequency(y, x, h, w):
        if y % 4 or x % 4:
            return math.hypot(y % 4, x % 4) / 8
        return max(1 / 256, math.hypot(y // 4 / -(-h // 4), x // 4 / -(-w // 4)) / 8)

    mean = sum(frequency(y, x, 64, 64) ** -2 for y in range(64) for x in range(64)) / 64**2
    power = [frequency(y, x, h, w) ** -2 / mean for y in range(h) for x in range(w)] * channels
    return [p / (1 + ratio**2 * p) for p in power]


def kl(budget, channel):
    slope, offset = {1: (0.925, 2.35), 3: (0.96, 2.6)}[channel]
    return budget**2 / (budget + 3.3) if budget <= 14 else slope * budget - offset


def excess(error, budget, channel):
    """v_i, by bisection for log a."""
    low, high = -200.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        bits = sum(math.log2(1 + math.exp(middle) * e) for e in error) / 2
        low, high = (middle, high) if bits < kl(budget, channel) else (low, middle)
    return [math.exp(low) * e for e in error]


def trellis_samples(message, v, rank, channel, step):
    """y of one step."""
    n, budget, state_bits = len(v), len(message), {1: 14, 3: 32}[channel]
    shuffled, sign = permutation(n, step), signs(n, step)
    p = sorted(shuffled, key=lambda i: -rank[i])
    line = sorted(range(n), key=lambda i: i * 0x9E3779B1 % 2**32)
    ends = [*range(14, budget, 4), budget] if budget > 14 else [budget]
    weights = [12 + max(0, end - 14) for end in ends]
    bounds = [0] + [n * weight // weights[-1] for weight in weights]
    codebook = normals(2**14, CODEBOOK, step)
    c = [0.0] * n
    for j, end in enumerate(ends):
        state = int("".join(map(str, message[:end]))[-state_bits:] or "0", 2)
        place = state % 2**14 ^ (state >> 14) * 0x9E3779B1 % 2**32 >> 18
        for z in range(bounds[j], bounds[j + 1]):
            c[line[z]] = codebook[(place + z - bounds[j]) % 2**14] / 65536
    u = [v[i] for i in p]
    groups = min(n // 16, -(-budget // 16))
    for q in range(groups):
        u[16 * q : 16 * q + 16] = [sum(u[16 * q : 16 * q + 16]) / 16] * 16
    r = [math.sqrt(1 + u_i) * c_i for u_i, c_i in zip(u, c)]
    for q in range(groups):
        part = r[16 * q : 16 * q + 16]
        r[16 * q : 16 * q + 16] = [sum((-1) ** (i & j).bit_count() * part[j] for j in range(16)) / 4 for i in range(16)]
    y = [0.0] * n
    for i in range(n):
        y[p[i]] = sign[i] * r[i]
    return y


def poisson_samples(message, n, budget, step):
    """y of one step, times 2^16."""
    order, chunks, y = permutation(n, step), len(message), [0] * n
    for c, k in enumerate(message):
        low, high = n * c // chunks, n * (c + 1) // chunks
        for i, value in enumerate(normals(high - low, CANDIDATES, step, 65536 * low + k * (high - low))):
            y[order[low + i]] = value
    return y


# --------------------------------------------------------------------------------------------------------------------- Relic


def relic_parameters(data):
    bits = Bits(data)
    facts = {name: bits.read(size) for name, size in (("model", 2), ("dithered", 1), ("affine", 1), ("prompted", 1))}
    facts |= {name: bits.read(size) for name, size in (("step", 12), ("mapped", 1), ("timestep", 14), ("tables", 16))}
    need(facts["model"] in (1, 2), "entropy model")
    channels = bits.read(8) + 1
    facts["coded"] = [bits.read(1) for _ in range(channels)]
    pairs = [(bits.read(6) - 32, bits.read(6) - 32) for _ in range(channels if facts["affine"] else 0)]
    facts["scales"], facts["shifts"] = [scale for scale, _ in pairs], [shift for _, shift in pairs]
    facts["levels"] = relic_map(bits) if facts["mapped"] else None
    need(bits.read(bits.left() % 8) == 0, "filler")
    prompt = bytes(bits.read(8) for _ in range(bits.left() // 8))
    need(bool(prompt) == bool(facts["prompted"]), "prompt flag")
    facts["prompt"] = prompt.decode()
    return facts


def relic_map(bits):
    rows, columns, found = bits.read(5) + 1, bits.read(5) + 1, []
    for _ in range(rows):
        if bits.read(1):
            found.append(found[-1] if found else [0] * columns)
            continue
        row = []
        while len(row) < columns:
            zeros = 0
            while not bits.read(1):
                zeros += 1
                need(zeros <= 5, "map")
            length = 2**zeros + bits.read(zeros)
            row += [bits.read(2)] * length
        need(len(row) == columns, "map")
        found.append(row)
    return found


def relic(data, std=(1.0,) * 4, hyperprior=None, factor=8):
    """All of a Relic file: its parameters, and under "v" its values. `std` as in the model's configuration; `hyperprior`: its tensors."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec == 2, "codec")
    facts = {"width": width, "height": height, "fingerprint": fingerprint.hex(), **relic_parameters(parameters)}
    payload, whole = payload_of(data, start, len(data) - start - 4)
    need(whole, "cut")
    std, channels = list(std), len(std)
    need(len(facts["coded"]) == channels, "channels")
    need(facts["tables"] == tables_identity(std, hyperprior if facts["model"] == 2 else None), "another entropy model")
    h, w = -(-height // factor), -(-width // factor)
    scales = facts["scales"] or [0] * channels
    steps = [step_width(facts["step"] + 16 * scale) for scale in scales]
    units = [max(1, round(512 * s / d)) if yes else 0 for s, d, yes in zip(std, steps, facts["coded"])]
    word = words(channels * h * w, DITHER) if facts["dithered"] else None
    u = [[2 * (word[c * h * w + i] % 256) - 255 if word else 0 for i in range(h * w)] for c in range(channels)]
    reader = RangeDecoder(payload)
    if not any(units):
        facts["v"] = [[0] * (h * w) for _ in units]
    elif facts["model"] == 1:
        facts["v"] = adaptive(reader, h, w, units, u)
    else:
        facts["v"] = learned(reader, h, w, units, u, hyperprior, facts["dithered"])
    return facts


def step_width(number):
    number = min(4095, max(0, number))
    return 2**-6 * (1 + number % 256 / 256) * 2 ** (number // 256)


def tables_identity(std, hyperprior):
    crc = zlib.crc32(json.dumps(std).encode())
    for name in sorted(hyperprior or {}):
        if not name.startswith("h_a"):
            numbers = [max(-127, min(127, math.floor(64 * x + 0.5))) for x in hyperprior[name][1]]
            crc = zlib.crc32(struct.pack(f"<{len(numbers)}b", *numbers), zlib.crc32(name.encode(), crc))
    return crc & 0xFFFF


def _table(i, f):
    inner = []
    for j in range(1, 33):
        z = (j - 16.5 - ((f + 0.5) / 16 - 0.5)) / 2 ** (i / 4 - 5)
        inner.append(round(65503 / (1 + math.exp(-max(-60.0, min(60.0, z))))))
    c = [0, *inner, 65503]
    return [1 + c[j + 1] - c[j] for j in range(33)]


TABLES = [[_table(i, f) for f in range(16)] for i in range(25)]


def law(mean, i):
    b = max(0, -((24 - i) // 4))
    left = mean - 256 * (2**b - 1) >> b
    return b, (left + 256) // 512, (left + 256) % 512 // 32, i - 4 * b


def values(reader, means, indices):
    """A batch of k under these laws."""
    laws = [law(mean, i) for mean, i in zip(means, indices)]
    r = [reader.under(TABLES[table][f]) - 16 for _, _, f, table in laws]
    low = [reader.equal(b) if b else 0 for b, *_ in laws]
    k = []
    for (b, base, _, _), offset, rest in zip(laws, r, low):
        if abs(offset) == 16:
            n = reader.equal(5)
            need(n <= 20, "a value too large")
            offset += (1 if offset > 0 else -1) * (2**n - 1 + reader.equal(n))
        k.append((base + offset << b) + rest)
        need(abs(k[-1]) < 2**20, "a value too large")
    return k


def code_length(k, mean, i):
    b, base, f, table = law(mean, i)
    r = (k >> b) - base
    escape = 5 + (abs(r) - 15).bit_length() - 1 if abs(r) >= 16 else 0
    return 16 - math.log2(TABLES[table][f][max(-16, min(16, r)) + 16]) + b + escape


KNIGHT = [(1, 2), (1, -2), (-1, 2), (-1, -2), (2, 1), (2, -1), (-2, 1), (-2, -1)]
NEIGHBOURS = {
    1: [(1, 1), (1, -1), (-1, 1), (-1, -1)] + [(1, 3), (1, -3), (-1, 3), (-1, -3), (3, 1), (3, -1), (-3, 1), (-3, -1)],
    2: [(0, 1), (0, -1), (1, 0), (-1, 0)] + KNIGHT,
    3: [(0, 1), (0, -1), (1, 0), (-1, 0)] + [(1, 1), (1, -1), (-1, 1), (-1, -1)] + KNIGHT[:4],
}


def batches(h, w, coarsest, largest):
    """(kind, s, positions), each position with its neighbours' indices, h w standing for what is outside."""
    yield 0, coarsest, [(y * w + x, []) for y in range(0, h, coarsest) for x in range(0, w, coarsest)]
    s = coarsest // 2
    while s:
        for kind, top, left in ((1, s, s), (2, 0, s), (3, s, 0)):
            found = [(y, x) for y in range(top, h, 2 * s) for x in range(left, w, 2 * s)]
            found = [(y * w + x, [outside(y, x, s * dy, s * dx, h, w) for dy, dx in NEIGHBOURS[kind]]) for y, x in found]
            parts = max(1, len(found) // largest) if largest else 1
            sizes = [len(found) // parts + (part < len(found) % parts) for part in range(parts)]
            for size in sizes if found else []:
                yield kind, s, found[:size]
                found = found[size:]
        s //= 2


def outside(y, x, dy, dx, h, w):
    row = y + dy if 0 <= y + dy < h else y - dy
    column = x + dx if 0 <= x + dx < w else x - dx
    return row * w + column if 0 <= row < h and 0 <= column < w else h * w


def limited(x, limit):
    return max(-limit, min(limit, x))


def around(v, kind, neighbours, unit):
    """(centre, spread, v of the neighbours less the centre)."""
    if kind == 0:
        return 0, unit + 65, []
    known = [v[i] for i in neighbours]
    centre = sum(known[:4]) + 2 >> 2
    difference = [value - centre for value in known]
    return centre, (sum(map(abs, difference[:4])) + (sum(map(abs, difference[4:])) >> 1) >> 3) + 65, difference


class Fit:
    def __init__(self, ridge):
        self.ridge, self.seen, self.weights = ridge, [], None

    def predict(self, features, first):
        if not self.seen:
            return first
        if self.weights is None:
            self.solve(len(features))
        return sum(a * b for a, b in zip(self.weights, features)) >> 12

    def add(self, rows):
        self.seen, self.weights = self.seen + rows, None

    def solve(self, n):
        matrix = [[sum(f[i] * f[j] for f, _ in self.seen) + self.ridge * (i == j) for j in range(n)] for i in range(n)]
        self.weights = solved(matrix, [sum(f[i] * target for f, target in self.seen) for i in range(n)])


def solved(matrix, vector):
    n, rows = len(vector), [[*row, value] for row, value in zip(matrix, vector)]
    for i in range(n):
        for row in rows[i + 1 :]:
            factor = (row[i] << 24) // max(1, rows[i][i])
            for j in range(i + 1, n + 1):
                row[j] -= factor * rows[i][j] >> 24
    weights = [0] * n
    for i in reversed(range(n)):
        rest = (rows[i][n] << 12) - sum(rows[i][j] * weights[j] for j in range(i + 1, n))
        weights[i] = limited(rest // max(1, rows[i][i]), 2**20)
    return weights


def adaptive(reader, h, w, units, u):
    thresholds = [round(2 ** (a / 2)) for a in range(2, 34)]
    channels = sorted((c for c in range(len(units)) if units[c]), key=lambda c: (-units[c], c))
    v, e = ([[0] * (h * w + 1) for _ in units] for _ in range(2))
    fits = {(kind, c): (Fit(2**20), Fit(2**16)) for kind in range(4) for c in channels}
    costs = {c: [[64 * abs(i - (2 * size - 15)) for i in range(48)] for size in range(33)] for c in channels}
    for kind, _, positions in batches(h, w, 16, 256):
        d, g = [[] for _ in positions], [[] for _ in positions]  # of the earlier channels
        for c in channels:
            rows, means, indices = [], [], []
            for n, (position, neighbours) in enumerate(positions):
                centre, spread, difference = around(v[c], kind, neighbours, units[c])
                relative = lambda x, spread=spread: limited(x * 64 // spread, 1023)  # noqa: E731
                features = [*map(relative, difference), *d[n], 0]
                near, far = sum(e[c][i] for i in neighbours[:4]) >> 2, sum(e[c][i] for i in neighbours[4:]) >> 3
                others = [*([relative(near), relative(far)] if kind else []), *g[n], 64]
                mean_fit, error_fit = fits[kind, c]
                mean = centre + (limited(mean_fit.predict(features, 0), 8184) * spread >> 6)
                error = max(1, max(4, min(1023, error_fit.predict(others, 48))) * spread >> 6)
                size = sum(threshold <= error for threshold in thresholds)
                index = min(range(48), key=lambda i: (costs[c][size][i], i))
                means.append(mean + u[c][position])
                indices.append(index)
                rows.append((features, others, centre, mean, size, relative))
            learnt, totals = ([], []), [[0] * 48 for _ in range(33)]
            for n, (k, mean) in enumerate(zip(values(reader, means, indices), means)):
                position, (features, others, centre, expected, size, relative) = positions[n][0], rows[n]
                value = 512 * k - u[c][position]
                v[c][position], e[c][position] = value, abs(value - expected)
                d[n].append(relative(value - centre))
                g[n].append(relative(e[c][position]))
                learnt[0].append((features, d[n][-1]))
                learnt[1].append((others, g[n][-1]))
                for i in range(48):
                    totals[size][i] += round(64 * code_length(k, mean, i))
            for fit, seen in zip(fits[kind, c], learnt):
                fit.add(seen)
            for size in range(33):
                for i in range(48):
                    beside = (totals[size - 1][i] if size else 0) + (totals[size + 1][i] if size < 32 else 0)
                    costs[c][size][i] += 3 * totals[size][i] + beside
    return [row[:-1] for row in v]


def safetensors(data):
    """Name -> (shape, numbers) of a file of float16 or float32 tensors."""
    (length,) = struct.unpack_from("<Q", data)
    header, found = json.loads(data[8 : 8 + length]), {}
    for name, facts in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in facts["data_offsets"])
            kind, size = {"F16": ("e", 2), "F32": ("f", 4)}[facts["dtype"]]
            found[name] = facts["shape"], struct.unpack(f"<{(end - start) // size}{kind}", data[start:end])
    return found


class Layer:
    """floor((W x + 64 b) / 64 + 1/2) within +-127, of each group."""

    def __init__(self, tensors, name):
        whole = lambda numbers: [max(-127, min(127, math.floor(64 * x + 0.5))) for x in numbers]  # noqa: E731
        (groups, out, into), weight = tensors[name + ".weight"][0], whole(tensors[name + ".weight"][1])
        bias = whole(tensors[name + ".bias"][1])
        rows = [weight[i * into : (i + 1) * into] for i in range(groups * out)]
        self.rows = [rows[g * out : (g + 1) * out] for g in range(groups)]
        self.bias = [bias[g * out : (g + 1) * out] for g in range(groups)]

    def __call__(self, x, group=0, positive=True):
        sums = [sum(a * b for a, b in zip(row, x)) + 64 * bias for row, bias in zip(self.rows[group], self.bias[group])]
        return [limited(max(0, y) if positive else y, 127) for y in (total + 32 >> 6 for total in sums)]


def learned(reader, h, w, units, u, tensors, dithered):
    levels = [round(2 ** (q / 8)) for q in range(8, 161)]
    level = lambda x: sum(threshold <= x for threshold in levels) - 65  # noqa: E731
    channels = sorted((c for c in range(len(units)) if units[c]), key=lambda c: (-units[c], c))
    h_s = [Layer(tensors, f"h_s.{i}") for i in range(2)]
    trunks = [[Layer(tensors, f"trunk.{kind}.{i}") for i in range(2)] for kind in range(4)]
    heads = [[Layer(tensors, f"heads.{kind}.{i}") for i in range(2)] for kind in range(4)]

    rows, columns = -(-h // 8), -(-w // 8)
    z_index = [max(-127, min(127, math.floor(64 * x + 0.5))) for x in tensors["z_index"][1]]
    z = [values(reader, [0] * (rows * columns), [max(0, min(60, i))] * (rows * columns)) for i in z_index]
    at = lambda plane, y, x: plane[y * columns + x] if 0 <= y < rows and 0 <= x < columns else 0  # noqa: E731
    features = []
    for y in range(rows):
        for x in range(columns):
            patch = [8 * at(plane, y + dy, x + dx) for plane in z for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            features.append(h_s[1](h_s[0](patch)))

    v = [[0] * (h * w + 1) for _ in units]
    for kind, s, positions in batches(h, w, 8, 0):
        places = [[around(v[c], kind, neighbours, units[c]) for c in range(len(units))] for _, neighbours in positions]
        trunk = []
        for (position, _), place in zip(positions, places):
            inputs = [limited(x * 32 // spread, 127) for _, spread, difference in place for x in difference or [0] * 12]
            inputs += [level(spread) for _, spread, _ in place] + [level(unit) for unit in units]
            inputs += features[position // w // 8 * columns + position % w // 8]
            inputs += [64 * (s == flag) for flag in (1, 2, 4, 8)] + [64 * bool(dithered)]
            trunk.append(trunks[kind][1](trunks[kind][0](inputs)))
        earlier = [[0] * len(units) for _ in positions]
        for c in channels:
            means, indices = [], []
            for n, (position, _) in enumerate(positions):
                centre, spread, _ = places[n][c]
                hidden = heads[kind][0](trunk[n] + earlier[n] + [abs(x) for x in earlier[n]], c)
                shift, scale = heads[kind][1](hidden, c, positive=False)
                means.append(centre + shift * spread // 64 + u[c][position])
                indices.append(math.floor(max(0, min(60, (4 * level(spread) + scale) / 8 + 18)) + 0.5))
            for n, k in enumerate(values(reader, means, indices)):
                position, (centre, spread, _) = positions[n][0], places[n][c]
                v[c][position] = 512 * k - u[c][position]
                earlier[n][c] = limited((v[c][position] - centre) * 32 // spread, 127)
    return [row[:-1] for row in v]


# --------------------------------------------------------------------------------------------------------------------- PerCo

GRIDS = {1: (8, 8), 2: (8, 10), 3: (4, 10), 4: (2, 8), 5: (2, 13), 6: (1, 6), 7: (1, 8)}
WORDS = 1


def perco_parameters(data):
    bits = Bits(data)
    grid, modelled, caption, seeded, filler = (bits.read(count) for count in (3, 1, 2, 1, 1))
    stride, size = GRIDS[grid] if grid else (2 ** bits.read(2), bits.read(4) + 1)
    need(grid or (bits.read(2) == 0 and (stride, size) not in GRIDS.values()), "grid")
    need(not filler and caption < 3, "filler or caption")
    vocabulary = bits.read(8) if caption == WORDS else None
    seed, position = varint(data, bits.position // 8) if seeded else (0, bits.position // 8)
    need(position == len(data) and bool(seed) == bool(seeded) and seed < 2**32, "seed or bytes left over")
    return {"stride": stride, "bits": size, "modelled": modelled, "caption": caption, "vocabulary": vocabulary, "seed": seed}


def perco(data, frequency, places, tokens, factor=8):
    """All of a PerCo file. `frequency` [K] and `places` [K][D] are the model's, `tokens` the tokenizer's: spelling -> number."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec == 3, "codec")
    facts = {"width": width, "height": height, "fingerprint": fingerprint.hex(), **perco_parameters(parameters)}
    payload, whole = payload_of(data, start, len(data) - start - 4)
    need(whole, "cut")
    ordered = sorted(tokens, key=tokens.get)
    identity = zlib.crc32("\n".join(f"{tokens[token]} {token}" for token in ordered).encode())
    need(facts["vocabulary"] in (None, identity & 255), "another tokenizer")
    rows, columns = (-(-(-(-side // factor)) // facts["stride"]) for side in (height, width))
    spelling = {number: spelt(token) for token, number in tokens.items()}
    if facts["modelled"]:
        reader = RangeDecoder(payload)
        facts["caption"] = caption(reader, facts["caption"], spelling)
        facts["grid"] = modelled_grid(reader, rows, columns, frequency, places)
    else:
        bits = Bits(payload)
        facts["grid"] = [[bits.read(facts["bits"]) for _ in range(columns)] for _ in range(rows)]
        need(max(map(max, facts["grid"])) < len(frequency), "index")
        facts["caption"] = caption(RangeDecoder(payload[-(-rows * columns * facts["bits"] // 8) :]), facts["caption"], spelling)
    return facts


def modelled_grid(reader, rows, columns, frequency, places):
    count, one, weights = len(frequency), 2**20, [9362] * 7
    octave_sizes = [0] * count.bit_length()
    for r in range(count):
        octave_sizes[(1 + r).bit_length() - 1] += 1
    octave_sizes = [size for size in octave_sizes if size]
    seen, octaves, grid = [1] * count, [[4] * len(octave_sizes) for _ in range(4)], []
    for y in range(rows):
        grid.append([])
        for x in range(columns):
            first = x == y == 0
            experts = [
                [one // count] * count,
                [one * f // sum(frequency) for f in frequency],
                [one * n // sum(seen) for n in seen],
            ]
            if first:
                experts += [experts[0]] * 4
            else:
                places_of = [octaves_of(point, places) for point in points(grid, x, y, places)]
                for c, octave in zip(octaves, places_of):
                    experts.append([one * c[o] // (sum(c) * octave_sizes[o]) for o in octave])
            frequencies = [1 + (sum(w * e[k] for w, e in zip(weights, experts)) >> 14) for k in range(count)]
            k = reader.under(frequencies)
            grid[y].append(k)
            shares = [w * e[k] for w, e in zip(weights, experts)]
            weights = [max(64, 65536 * share // sum(shares)) for share in shares]
            seen[k] += 8
            if not first:
                for c, octave in zip(octaves, places_of):
                    c[octave[k]] += 8
    return grid


def points(grid, x, y, places):
    """Twice W, N, (W + N) / 2 and W + N - NW, so that they are integers."""
    w = places[grid[y][x - 1]] if x else places[grid[y - 1][x]]
    n = places[grid[y - 1][x]] if y else w
    nw = places[grid[y - 1][x - 1]] if x and y else w
    yield [2 * a for a in w]
    yield [2 * b for b in n]
    yield [a + b for a, b in zip(w, n)]
    yield [2 * (a + b - c) for a, b, c in zip(w, n, nw)]


def octaves_of(point, places):
    distance = [sum((2 * a - b) ** 2 for a, b in zip(place, point)) for place in places]
    octave = [0] * len(places)
    for r, k in enumerate(sorted(range(len(places)), key=lambda k: (distance[k], k))):
        octave[k] = (1 + r).bit_length() - 1
    return octave


PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [*PLAIN, *(byte for byte in range(256) if byte not in PLAIN)]
SPELLING = {chr(byte) if byte in PLAIN else chr(256 + i - len(PLAIN)): byte for i, byte in enumerate(ALPHABET)}


def letter_law():
    """Frequencies of the 256 bytes."""
    law = [15 if chr(byte) in "0123456789" else 1 for byte in range(256)]
    for i, letter in enumerate(" etaoinsrhldcugmpfywbkv.,'x-jqz"):
        law[ord(letter)] = 6000 // (i + 4)
        if letter.upper() != letter:
            law[ord(letter.upper())] = max(1, 150 // (i + 4))
    return law


def spelt(token):
    """(bytes, whether a word ends) of a token, None for one that stands for no bytes."""
    letters = token.removesuffix("</w>")
    known = letters and all(letter in SPELLING for letter in letters) and not token.startswith("<|")
    return (bytes(SPELLING[letter] for letter in letters), token.endswith("</w>")) if known else None


def caption(reader, way, spelling):
    if way == WORDS:
        return words_caption(reader, spelling)
    if way == 0:
        return ""
    bits, law = reader.equal(4), letter_law()
    return bytes(reader.under(law) for _ in range(2**bits + reader.equal(bits))).decode()


def token(reader):
    kind = reader.under([int(f) for f in "2 61 1 1 12 9 27 4 13 6 13 19 45 41 28 32 13 4 2 1 1 1".split()])
    if kind < 2:
        law = letter_law()
        return 256 * kind + reader.under([law[byte] for byte in ALPHABET])
    return 511 + 2 ** (kind - 2) + reader.equal(kind - 2)


def words_caption(reader, spelling):
    text, before = "", None
    while True:
        word, ends = b"", False
        while not ends:
            number = token(reader)
            need(spelling.get(number), "token")
            word, ends = word + spelling[number][0], spelling[number][1]
        word = word.decode()
        stop = lambda word: word in (".", "!", "?")  # noqa: E731
        case = reader.under([32, 30, 2] if before is None or stop(before) else [60, 3, 1])
        large = "".join(letter.upper() if letter < "\x7f" else letter for letter in word)
        glued = before is None or reader.under([1, 15] if "!" <= word[0] <= "~" and not word[0].isalnum() else [63, 1])
        text += ("" if glued else " ") + [word, large[0] + word[1:], large][case]
        if reader.under([1, 3] if stop(word) else [15, 1]):
            return text
        before = word


# ---------------------------------------------------------------------------------------------------------------------- UQDM


def uqdm(data):
    """All of a UQDM file but what its sections mean, which needs the network."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec == 4 and len(parameters) > 1, "codec or parameters")
    steps, exact, position = parameters[0] >> 1, parameters[0] & 1, 2 + 2 * (parameters[0] >> 1)
    need(len(parameters) >= position, "checks")
    checks, sizes = list(struct.unpack_from(f"<{steps}H", parameters, 2)), []
    for _ in range(steps + exact):
        size, position = varint(parameters, position)
        sizes.append(size)
    need(position == len(parameters), "parameters")
    payload, whole = payload_of(data, start, sum(sizes))
    sections, place = [], 0
    for size in sizes:
        if place + size <= len(payload):
            sections.append(payload[place : place + size])
        place += size
    facts = {"width": width, "height": height, "fingerprint": fingerprint.hex(), "nudge": parameters[1], "complete": whole}
    return facts | {"checks": checks, "sections": sections, "exact": bool(exact)}


@functools.lru_cache(4096)
def step_table(row):
    i, f, c = row // 64, row % 64, [0]
    r = min(24, math.ceil(12 * 2 ** (i / 8 - 7)) + 1)
    total = 1048575 - 2 * r
    for j in range(1, 2 * r + 1):
        z = (j - r - 0.5 - ((f + 0.5) / 64 - 0.5)) / 2 ** (i / 8 - 7)
        c.append(round(total / (1 + math.exp(-max(-60.0, min(60.0, z))))))
    c.append(total)
    return [1 + c[j + 1] - c[j] for j in range(2 * r + 1)]


@functools.lru_cache(64)
def pixel_table(f, gamma):
    c, weights = [0], []
    for a in range(-8, 9):
        d = (a - ((f + 0.5) / 128 - 0.5)) * math.exp(-gamma / 2) / 128
        weights.append(math.exp(-min(600, d * d / 2)))
    for j in range(17):
        c.append(round(1048559 * sum(weights[: j + 1]) / sum(weights)))
    return [1 + c[j + 1] - c[j] for j in range(17)]


def offsets(section, rows, table_of):
    """The offsets of a section, given their rows."""
    reader, found = RangeDecoder(section), [0] * len(rows)
    for row in sorted(set(rows)):
        for i in (i for i, other in enumerate(rows) if other == row):
            found[i] = reader.under(table_of(row)) - len(table_of(row)) // 2
    for i, row in enumerate(rows):
        if abs(found[i]) == len(table_of(row)) // 2:
            n = reader.equal(5)
            need(n <= 20, "a value too large")
            found[i] += (1 if found[i] > 0 else -1) * (2**n - 1 + reader.equal(n))
    return found


@functools.cache
def table_checksum():
    table = [frequency for row in range(73 * 64) for frequency in step_table(row)]
    return zlib.crc32(struct.pack(f"<{len(table)}i", *table))


def check_of(wholes, rows):
    return zlib.crc32(struct.pack(f"<{len(wholes) + len(rows)}i", *wholes, *rows), table_checksum()) & 0xFFFF


# ------------------------------------------------------------------------------------------------------------ lossless files


def lossless(data):
    """All of a lossless file but its pixels."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec > 128 and max(width, height) < 65536, "codec or size")
    need(parameters[:1] in (b"\0", b"\1"), "prediction")
    facts, position = {"nudge": None, "digest": None}, 1
    if parameters[0]:
        facts, position = {"nudge": parameters[1], "digest": parameters[2:10]}, 10
    size, position = varint(parameters, position)
    count, position = varint(parameters, position)
    need(position == len(parameters), "parameters")
    payload, whole = payload_of(data, start, size + count)
    if whole:
        inner = container(payload[:size])
        need(inner[:4] == (codec - 128, width, height, fingerprint), "the lossy file")
    return facts | {"width": width, "height": height, "lossy": payload[:size], "pixels": payload[size:] if whole else None}


def pixels(data, h, w, m=None):
    """{(channel, y, x): value}, the channels being green, red, blue; m: the prediction, in the same way."""
    reader, found = RangeDecoder(data), {}
    misses, blend = {}, {}  # (channel, y, x) -> of each guess; of all
    fits = [RunningFit(6 + 4 * (c + (m is not None))) for c in range(3)]
    totals, counts = [[int(2 ** (j / 2)) for j in range(25)] for _ in range(3)], [[1] * 25 for _ in range(3)]
    sizes = [round(2 ** (j / 2)) for j in range(24)]
    scales = [round(512 * math.log(2) * 2 ** ((j + 0.5) / 4 - 5)) for j in range(56)]
    rows = min(h, 512, max(1, 2**21 // w))
    for top in range(0, h, rows):
        strip = [(y, x) for y in range(top, min(h, top + rows)) for x in range(w)]
        diagonals = {}
        for y, x in strip:
            diagonals.setdefault(2 * (y - top) + x, []).append((y, x))
        for d in sorted(diagonals):
            for c in range(3):
                run = []
                for y, x in diagonals[d]:
                    near = [beside(y, x, dy, dx, w) for dy, dx in AROUND]
                    planes = [(found, j) for j in range(c)] + ([(m, c)] if m is not None else [])
                    W, N, NW, NE, WW, NN, NNE = (16 * found[c, *place] if place else 2048 for place in near)
                    middle, G = W + N >> 1, W + N - NW
                    guesses = [W, N, G, N + NE - NNE, W + NE - N, W + NE >> 1]
                    f = [value - middle for value in (W, NW, NE, WW, NN, NNE)]
                    for values_of, j in planes:
                        g, (gW, gN, gNW, gNE) = (
                            16 * values_of[j, y, x],
                            [16 * values_of[j, *place] if place else 2048 for place in near[:4]],
                        )
                        between = gW + gN >> 1
                        guesses += [g + W - gW, g + N - gN, g + G - (gW + gN - gNW), g + middle - between]
                        f += [value - between for value in (g, gW, gNW, gNE)]
                    f = [limited(value, 2047) for value in f]
                    guesses.append(middle + (sum(a * b for a, b in zip(fits[c].w, f)) >> 12))
                    guesses = [max(0, min(4080, value)) for value in guesses]
                    weights = []
                    for k in range(len(guesses)):
                        e = [misses[c, *place][k] if place else 0 for place in near]
                        weights.append(2**40 // (sum(e[:4]) + (e[4] + e[5] >> 1) + 8) ** 2)
                    M = 32 * sum(a * b for a, b in zip(weights, guesses)) // sum(weights)
                    D = sum(abs(value - (M >> 5)) for value in guesses) // len(guesses)
                    E = [blend[c, *place] if place else 0 for place in near]
                    a = 2 * (E[0] + E[1]) + E[2] + E[3] + (E[4] + E[5] >> 1) + 2 * D + 2 * sum(blend[j, y, x] for j in range(c))
                    size = sum(edge <= a // (9 + 2 * c) + 1 for edge in sizes)
                    i = sum(edge <= 16 * totals[c][size] // counts[c][size] for edge in scales)
                    run.append(((y, x), M, i, size, guesses, f, middle))
                read = values(reader, [item[1] for item in run], [item[2] for item in run])
                for (place, M, _, size, guesses, _, _), p in zip(run, read):
                    need(0 <= p <= 255, "no pixel")
                    found[c, *place], misses[c, *place] = p, [abs(value - 16 * p) for value in guesses]
                    blend[c, *place] = abs(M - 512 * p) >> 5
                    totals[c][size] += blend[c, *place]
                    counts[c][size] += 1
                for j in range(25):
                    if counts[c][j] > 512:
                        totals[c][j], counts[c][j] = totals[c][j] >> 1, counts[c][j] >> 1
                fits[c].add([(item[5], 16 * p - item[6]) for item, p in zip(run, read)])
    return found


AROUND = [(0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-2, 1)]


def beside(y, x, dy, dx, w):
    """The place of a neighbour, or of what replaces it; None at the first pixel."""
    if y + dy >= 0 and 0 <= x + dx < w:
        return y + dy, x + dx
    return (y, x - 1) if x else (y - 1, x) if y else None


class RunningFit:
    def __init__(self, n):
        self.A, self.B, self.w, self.runs = [[0] * n for _ in range(n)], [0] * n, [0] * n, 0

    def add(self, rows):
        n = len(self.B)
        for i in range(n):
            self.B[i] += sum(f[i] * target for f, target in rows) - (self.B[i] >> 6)
            for j in range(n):
                self.A[i][j] += sum(f[i] * f[j] for f, _ in rows) - (self.A[i][j] >> 6)
        self.runs += 1
        if self.runs % 4 == 0:
            ridge = [[self.A[i][j] + 4096 * (i == j) for j in range(n)] for i in range(n)]
            self.w = solved(ridge, self.B)


# -------------------------------------------------------------------------------------------------------------------- Refine


def refine(data):
    """All of a refined file but the picture."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec == 5, "codec")
    payload, whole = payload_of(data, start, len(data) - start - 4)
    need(whole, "cut")
    base, end = parameters[0], 2 + parameters[1] + 1
    need(1 <= base <= 7, "base")
    errors = list(parameters[2:end])
    seed, end = varint(parameters, end)
    need(seed < 2**32, "seed")
    name = {1: "jpeg", 2: "webp", 3: "avif", 4: "jxl", 5: "jpeg2000", 6: "diffc", 7: "relic"}[base]
    facts = {"width": width, "height": height, "fingerprint": fingerprint.hex(), "prompt": parameters[end:].decode()}
    return facts | {"base": name, "errors": errors, "seed": seed, "bytes": len(payload), "payload": payload}


# --------------------------------------------------------------------------------------------------------------- Text+Sketch

CELLS = [(0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -2), (-1, 2), (-2, -1), (-2, 1), (0, -3), (-3, 0)]
CELLS += [(-2, -2), (-2, 2), (-1, -3), (-1, 3), (-3, -1), (-3, 1)]


def text_sketch(data):
    """All of a Text+Sketch file: ids, thumbnail and sketch, None if they are not there."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec == 6 and parameters, "codec")
    payload, whole = payload_of(data, start, len(data) - start - 4)
    need(whole, "cut")
    bits = Bits(parameters)
    prompt, levels, flagged, seeded, filler = (bits.read(count) for count in (2, 3, 1, 1, 1))
    side, end = varint(parameters, 1) if levels else (0, 1)
    small = parameters[end] if flagged else 0
    seed, end = varint(parameters, end + flagged) if seeded else (0, end + flagged)
    need(prompt < 3 and not filler and end == len(parameters), "parameters")
    need((1 <= side <= 512) == bool(levels) and (1 <= small <= 32) == bool(flagged), "sides")
    need((0 < seed < 2**32) == bool(seeded), "seed")

    def grid(s):
        m = max(width, height)
        return [max(1, (2 * pixels * min(s, m) + m) // (2 * m)) for pixels in (height, width)]

    reader, facts = RangeDecoder(payload), {"width": width, "height": height, "fingerprint": fingerprint.hex(), "seed": seed}
    count = reader.equal(7) if prompt else 0
    need(bool(count) == bool(prompt), "no tokens")
    facts["ids"] = [token(reader) if prompt == 1 else reader.equal(16) for _ in range(count)]
    facts["thumbnail"] = colours(reader, *grid(small)) if small else None
    facts["sketch"] = lines(reader, *grid(side), levels) if levels else None
    return facts


def colours(reader, rows, columns):
    m = max(rows, columns)
    a, b = [33, 28, 25, 24, 22, 20, 19, 18, 17, 16, 15, 14, 14, 13], [0, 7, 12]
    places = [(c, i, j) for c in range(3) for i in range(rows) for j in range(columns)]
    index = [max(0, a[min(13, i * m // rows + j * m // columns)] - b[c]) for c, i, j in places]
    k = iter(values(reader, [0] * len(index), index))
    return [[[next(k) for _ in range(columns)] for _ in range(rows)] for _ in range(3)]


def lines(reader, rows, columns, bits):
    level = {}
    counts, weights = {}, {}
    for y in range(rows):
        for x in range(columns):
            v = 0
            while v < bits:
                near = [int(level.get((y + i, x + j), 0) > v) for i, j in CELLS]
                n = [counts.setdefault((v, *near[:size]), [0, 0]) for size in (3, 6, 10, 14, 18)]
                w = weights.setdefault((v, *near[:3]), [22528] * 5)
                s = [round(256 * math.log(one + 0.4)) - round(256 * math.log(zero + 0.4)) for zero, one in n]
                odds = max(-2048, min(2048, sum(a * b for a, b in zip(w, s)) >> 16))
                p = round(65536 / (1 + math.exp(-odds / 256)))
                bit = reader.under([65536 - p, p])
                for i in range(5):
                    w[i] += (65536 * bit - p) * s[i] >> 14
                    n[i][bit] += 1
                    if sum(n[i]) > 60:
                        n[i][:] = n[i][0] // 2, n[i][1] // 2
                if not bit:
                    break
                v += 1
            level[y, x] = v
    return [[level[y, x] for x in range(columns)] for y in range(rows)]


# ----------------------------------------------------------------------------------------------------------------------- CDC


def cdc(data, tensors, log_scales, levels, multiple, cell):
    """All of a CDC file: its parameters, and under "y_hat" the latent times 512, channel by channel. `tensors`: of the context model, name ->
    (shape, numbers); `cell`: pixels along a side of a position of the latent."""
    codec, width, height, fingerprint, parameters, start = container(data)
    need(codec == 7, "codec")
    payload, whole = payload_of(data, start, len(data) - start - 4)
    need(whole, "cut")
    need(parameters, "parameters")
    level, (seed, end) = parameters[0], varint(parameters, 1) if len(parameters) > 1 else (0, 1)
    need(end == len(parameters) and (seed or end == 1) and seed < 2**32, "parameters")
    need(level < levels, "another model")

    h, w = (-(-side // multiple) * multiple // cell for side in (height, width))
    a, b = -(-h // 4), -(-w // 4)
    reader, planes = RangeDecoder(payload), []
    for mean, index in zip(tensors["z_mean"][1], tensors["z_index"][1]):
        k = values(reader, [0] * (a * b), [max(0, min(60, round(64 * index)))] * (a * b))
        planes.append([[512 * k[y * b + x] + round(512 * mean) for x in range(b)] for y in range(a)])
    if levels > 1:
        planes.append([[round(512 * (level / (levels - 1)))] * b for _ in range(a)])
    for i in range(2):
        planes = fixed_point(spread_out(planes), tensors, i, -1)
        planes = [[[x * 13107 + 32768 >> 16 if x < 0 else x for x in row] for row in plane] for plane in planes]
    planes = fixed_point(planes, tensors, 2, 1)
    y_hat = []
    for mean, scale in zip(planes[: len(planes) // 2], planes[len(planes) // 2 :]):
        mean, scale = ([x for row in plane[:h] for x in row[:w]] for plane in (mean, scale))
        k = values(reader, [0] * (h * w), [cdc_table(s, log_scales) for s in scale])
        y_hat.append([512 * step + m for step, m in zip(k, mean)])
    facts = {"width": width, "height": height, "fingerprint": fingerprint.hex(), "level": level, "seed": seed}
    return facts | {"y_hat": y_hat}


def cdc_table(scale, log_scales):
    if log_scales:
        return max(0, min(60, 20 + (4 * scale + 256) // 512))
    return sum(512 * math.pi / math.sqrt(3) * 2 ** ((i - 19.5) / 4) <= max(51, scale) for i in range(60))


def spread_out(planes):
    """With zeros between, so that a transposed convolution becomes one."""
    return [
        [[x if y == 0 else 0 for x in row for y in (0, 1)] if z == 0 else [0] * 2 * len(row) for row in p for z in (0, 1)]
        for p in planes
    ]


def fixed_point(planes, tensors, i, direction):
    """Layer i of the hyper-decoder; direction: 1 for weights [out, in, k, k] as they are, -1 for [in, out, k, k] turned round."""
    (first, second, k, _), weight = tensors[f"hyper_decoder.{i}.weight"]
    n_in, n_out = (second, first) if direction == 1 else (first, second)
    h, w, r, found = len(planes[0]), len(planes[0][0]), k // 2, []
    for o, bias in enumerate(tensors[f"hyper_decoder.{i}.bias"][1]):
        starts = [((o * n_in + c) if direction == 1 else (c * n_out + o)) * k * k for c in range(n_in)]
        taps = [weight[start : start + k * k][::direction] for start in starts]
        step = 2.0 ** (math.frexp(max(2.0**-16, *(abs(x) for tap in taps for x in tap)))[1] - 7)
        taps = [[max(-127, min(127, round(x / step))) for x in tap] for tap in taps]
        plane = []
        for y in range(h):
            for x in range(w):
                total = sum(
                    taps[c][dy * k + dx] * planes[c][y + dy - r][x + dx - r]
                    for c in range(n_in)
                    for dy in range(max(0, r - y), min(k, h + r - y))
                    for dx in range(max(0, r - x), min(k, w + r - x))
                )
                plane.append(limited(math.floor(total * step + round(512 * bias) + 0.5), 512 << 11))
        found.append([plane[y * w : y * w + w] for y in range(h)])
    return found
