"""Why a file cannot be decoded: the kinds of BitstreamError."""


class BitstreamError(ValueError):
    """A file that cannot be decoded; the kinds below say why."""


class NotABitstream(BitstreamError):
    """The data is something else than a file of this package."""


class UnsupportedVersion(BitstreamError):
    """Written by another version of the format, or by a codec that this version does not know."""


class Corrupt(BitstreamError):
    """The data was damaged, or cut where it cannot be."""


class WrongModel(BitstreamError):
    """The file was made with other weights, or by another codec, than those at hand."""


class LimitExceeded(BitstreamError):
    """The file asks for more than the limits allow."""
