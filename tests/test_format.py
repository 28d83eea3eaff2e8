import os
import signal
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_compress.contract import DIFFC
from diffusers_compress.errors import BitstreamError, Corrupt, LimitExceeded, NotABitstream, UnsupportedVersion
from diffusers_compress.files import _move_new, write_file
from diffusers_compress.format import container
from diffusers_compress.format.bits import BitReader, BitWriter, read_varint, write_varint
from diffusers_compress.format.container import Header, overhead, pack, read_header, read_payload
from diffusers_compress.format.limits import Limits

HEADER = Header(DIFFC, 768, 512, b"\x01\x02\x03\x04", b"params")
PAYLOAD = bytes(range(40))
FILE = pack(HEADER, PAYLOAD)
LENGTH = len(PAYLOAD)
START = len(FILE) - len(PAYLOAD) - 4


def unpack(data, length=LENGTH):
    header, offset = read_header(data)
    return header, *read_payload(data, offset, length)


def reseal(data):
    """A file with right checksums around a header that was tampered with; `data` ends with the parameters."""
    data += container._crc16(data).to_bytes(2, "little")
    return data + zlib.crc32(data).to_bytes(4, "little")


def test_golden_bytes():
    # The layout byte by byte, so that a change of the format cannot pass unseen.
    assert pack(Header(1, 768, 512, b"\xaa\xbb\xcc\xdd", b"\x05"), b"\xfe\xff").hex() == (
        "dfc1" "01" "8006" "8004" "aabbccdd" "01" "05" "9023" "feff" "f01af2d9"
    )  # fmt: skip
    assert container._crc16(b"123456789") == 0x29B1
    assert zlib.crc32(b"123456789") == 0xCBF43926


def test_overhead_of_a_kodak_picture_is_18_bytes():
    header = Header(DIFFC, 768, 512, b"abcd", b"")
    assert overhead(header) == 18 == len(pack(header, b""))
    assert overhead(HEADER) == len(FILE) - len(PAYLOAD)


@given(
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.binary(min_size=4, max_size=4),
    st.binary(max_size=300),
    st.binary(max_size=300),
)
def test_round_trip(width, height, fingerprint, parameters, payload):
    header = Header(DIFFC, width, height, fingerprint, parameters)
    data = pack(header, payload)
    assert len(data) == overhead(header) + len(payload)
    assert unpack(data, len(payload)) == (header, payload, True)
    assert unpack(data, None) == (header, payload, True)
    assert unpack(memoryview(data), None) == (header, payload, True)


@given(st.binary(max_size=64), st.sampled_from([b"", b"\xdf", b"\xdf\xc1", b"\xdf\xc1\x01", FILE[:START]]), st.integers(0, 80))
def test_arbitrary_bytes_raise_only_bitstream_errors(data, prefix, length):
    for wanted in (None, length):
        try:
            unpack(prefix + data, wanted)
        except BitstreamError:
            pass


@pytest.mark.parametrize("length", [len(PAYLOAD), None])
def test_every_flipped_bit_raises(length):
    for bit in range(8 * len(FILE)):
        data = bytearray(FILE)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            unpack(bytes(data), length)


def test_every_cut_header_raises():
    for length in range(START):
        with pytest.raises(NotABitstream if length == 0 else Corrupt, match="empty" if length == 0 else "cut short"):
            read_header(FILE[:length])


def test_every_cut_behind_the_header_gives_the_payload_that_is_left():
    for length in range(START, len(FILE)):
        header, payload, complete = unpack(FILE[:length])
        assert header == HEADER and not complete
        assert payload == PAYLOAD[: length - START]  # never a byte of the checksum


def test_every_cut_raises_if_the_length_is_unknown():
    for length in range(START, len(FILE)):
        with pytest.raises(Corrupt, match="cut short or damaged"):
            unpack(FILE[:length], None)


def test_trailing_bytes_are_counted():
    with pytest.raises(Corrupt, match="3 bytes too many"):
        unpack(FILE + b"abc")
    with pytest.raises(Corrupt):
        unpack(FILE + b"abc", None)


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n", b"\xdf", b"\xdf\xff\xd8", "text", None])
def test_not_a_bitstream(data):
    with pytest.raises(Corrupt if data == b"\xdf" else NotABitstream):
        read_header(data)


@pytest.mark.parametrize("version", [0, 2, 15])
def test_other_versions_are_named(version):
    with pytest.raises(UnsupportedVersion, match=f"version {version},.*upgrade"):
        read_header(bytes([0xDF, 0xC0 | version]) + FILE[2:])


def test_unknown_codec():
    with pytest.raises(UnsupportedVersion, match="codec number 250"):
        read_header(reseal(b"\xdf\xc1\xfa\x01\x01abcd\x00"))


@pytest.mark.parametrize("size", [b"\x00\x01", b"\x01\x00"])
def test_a_picture_without_pixels_is_corrupt(size):
    with pytest.raises(Corrupt, match="no pixels"):
        read_header(reseal(b"\xdf\xc1\x01" + size + b"abcd\x00"))


@pytest.mark.parametrize("number", [b"\x81\x00", b"\x80\x80\x80\x80\x00", b"\x81\x81\x81\x81\x81\x01"])
def test_a_longer_number_than_needed_is_corrupt(number):
    with pytest.raises(Corrupt, match="longer than"):
        read_header(reseal(b"\xdf\xc1\x01" + number + b"\x01abcd\x00"))


def test_limits():
    picture = pack(Header(DIFFC, 10_001, 10_000, b"abcd", b""), b"")
    with pytest.raises(LimitExceeded, match="10001x10000"):
        read_header(picture)
    assert read_header(picture, Limits(pixels=100_010_000))[0].width == 10_001
    parameters = pack(Header(DIFFC, 1, 1, b"abcd", bytes(65_537)), b"")
    with pytest.raises(LimitExceeded, match="65537 bytes"):
        read_header(parameters)
    assert len(read_header(parameters, Limits(parameter_bytes=65_537))[0].parameters) == 65_537


@pytest.mark.parametrize(
    "header",
    [
        Header(0, 1, 1, b"abcd", b""),
        Header(DIFFC, 0, 1, b"abcd", b""),
        Header(DIFFC, 1, -1, b"abcd", b""),
        Header(DIFFC, 1 << 35, 1, b"abcd", b""),
        Header(DIFFC, 1, 1, b"abc", b""),
    ],
)
def test_pack_refuses_what_the_format_cannot_hold(header):
    with pytest.raises(ValueError) as error:
        pack(header, b"")
    assert not isinstance(error.value, BitstreamError)


@given(st.integers(0, 2**35 - 1))
def test_varint(value):
    data = write_varint(value)
    assert len(data) == max(1, -(-value.bit_length() // 7))
    assert read_varint(b"x" + data + b"y", 1) == (value, 1 + len(data))


def test_varint_bounds():
    assert write_varint(300).hex() == "ac02"
    for value in (-1, 2**35):
        with pytest.raises(ValueError):
            write_varint(value)


@given(st.lists(st.integers(0, 40).flatmap(lambda bits: st.tuples(st.integers(0, (1 << bits) - 1), st.just(bits)))))
def test_bits(fields):
    writer = BitWriter()
    for value, bits in fields:
        writer.write(value, bits)
    data = writer.to_bytes()
    total = sum(bits for _, bits in fields)
    assert len(data) == -(-total // 8)
    reader = BitReader(data)
    assert [reader.read(bits) for _, bits in fields] == [value for value, _ in fields]
    assert reader.bits_left == -total % 8
    assert reader.read(reader.bits_left) == (1 << -total % 8) - 1  # padding of ones
    with pytest.raises(Corrupt):
        reader.read(1)


def test_bits_are_most_significant_first():
    writer = BitWriter()
    writer.write(1, 1)
    writer.write(0b0010, 4)
    assert writer.to_bytes().hex() == "97" and writer.to_bytes(pad=0).hex() == "90"
    for value, bits in [(4, 2), (-1, 3), (0, -1)]:
        with pytest.raises(ValueError):
            writer.write(value, bits)


@given(st.integers(0, 12), st.lists(st.integers(0, 500)), st.integers(0, 7))
def test_rice_codes_end_by_themselves(k, values, first):
    writer = BitWriter()
    writer.write(0, first)
    for value in values:
        writer.write_rice(value, k)
    reader = BitReader(writer.to_bytes())
    reader.read(first)
    got = []
    while (value := reader.read_rice(k)) is not None:
        got.append(value)
    assert got == values
    assert reader.bits_left == 0 and reader.read_rice(k) is None


def test_rice_code_bits():
    writer = BitWriter()
    writer.write_rice(9, 2)  # 110 01
    assert writer.to_bytes(pad=0).hex() == "c8"
    with pytest.raises(ValueError):
        writer.write_rice(-1, 2)


def test_a_cut_rice_code_is_none():
    writer = BitWriter()
    writer.write_rice(5, 12)  # 0 and twelve bits
    assert BitReader(writer.to_bytes()[:1]).read_rice(12) is None


def test_write_file(tmp_path):
    path = tmp_path / "a.dfc"
    write_file(path, b"one")
    with pytest.raises(FileExistsError):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    write_file(path, b"two", overwrite=True)
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.dfc"]


def test_write_file_leaves_nothing_behind_when_interrupted(tmp_path, monkeypatch):
    path = tmp_path / "a.dfc"
    path.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.setattr(os, "link", interrupted)
    for target, overwrite in [(path, True), (tmp_path / "b.dfc", False)]:
        with pytest.raises(KeyboardInterrupt):
            write_file(target, b"new", overwrite)
    assert os.listdir(tmp_path) == ["a.dfc"] and path.read_bytes() == b"old"


def test_write_file_does_not_overwrite_a_file_that_appears_meanwhile(tmp_path):
    path = tmp_path / "a.dfc"
    path.write_bytes(b"theirs")
    other = tmp_path / "b"
    other.write_bytes(b"ours")
    with pytest.raises(FileExistsError):
        _move_new(other, path)
    assert path.read_bytes() == b"theirs"


def test_write_file_without_hard_links(tmp_path, monkeypatch):
    def unsupported(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", unsupported)
    write_file(tmp_path / "a.dfc", b"one")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a.dfc", b"two")
    assert os.listdir(tmp_path) == ["a.dfc"] and (tmp_path / "a.dfc").read_bytes() == b"one"


def test_write_file_replaces_no_folder(tmp_path):
    with pytest.raises(FileExistsError, match="not a regular file"):
        write_file(tmp_path, b"data", overwrite=True)


def python(program, *arguments, **options):
    """A process of its own that runs a program; `write_file` is there already."""
    program = f"import os, resource, signal, sys\nfrom diffusers_compress.files import write_file\n{program}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_write_file_on_a_full_disk(tmp_path, overwrite):
    """The system refuses the file's tenth kilobyte; nothing is left but what was there."""
    path = tmp_path / "a.dfc"
    if overwrite:
        path.write_bytes(b"old")
    program = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n    write_file(sys.argv[1], bytes(20_000), overwrite=sys.argv[2] == 'True')\n"
        "except OSError as error:\n    print(error.strerror)"
    )
    assert python(program, path, overwrite).communicate()[0] == "File too large\n"
    assert os.listdir(tmp_path) == (["a.dfc"] if overwrite else [])
    assert not overwrite or path.read_bytes() == b"old"


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.dfc"
    path.write_bytes(b"old")
    program = "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nwrite_file(sys.argv[1], b'new', overwrite=True)"
    process = python(program, path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and path.read_bytes() == b"old"


@pytest.mark.parametrize("overwrite", [False, True])
def test_processes_that_write_one_file(tmp_path, overwrite):
    """Whoever reads meets one of their files, whole; without `overwrite` one alone wins."""
    path = tmp_path / "a.dfc"
    program = (
        "sys.stdin.read()\n"
        "for _ in range(50):\n"
        "    try:\n        write_file(sys.argv[1], sys.argv[2].encode() * 100_000, overwrite=sys.argv[3] == 'True')\n"
        "    except FileExistsError:\n        print('lost')\n"
    )
    writers = [python(program, path, letter, overwrite, stdin=subprocess.PIPE) for letter in "abcd"]
    for writer in writers:
        writer.stdin.close()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert data == data[:1] * 100_000
    lost = sum(writer.stdout.read().count("lost") for writer in writers)
    assert [writer.stderr.read() for writer in writers] == [""] * 4
    assert lost == (0 if overwrite else 199) and os.listdir(tmp_path) == ["a.dfc"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc here")
def test_write_file_where_nothing_can_be_written():
    with pytest.raises(OSError):
        write_file("/proc/self/a.dfc", b"data")
