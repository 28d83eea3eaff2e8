"""Refinement: a file of JPEG, WebP, AVIF, JPEG XL or JPEG 2000, and what it lost painted anew."""
