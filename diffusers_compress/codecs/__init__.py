"""The codecs' own parts, a folder each."""
