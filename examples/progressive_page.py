"""A page on which a picture gets sharper while its file arrives, in any browser:

    python examples/progressive_page.py PHOTO        # then open http://127.0.0.1:8000

The page, `progressive_page.html`, is static. It fetches the beginning of `photo.dfc` by HTTP range requests, only the bytes that it has
not yet, and asks this server to decode what it has: browsers cannot run the model. The file may lie on any server that knows ranges.
"""

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.errors import BitstreamError
from diffusers_compress.files import png
from diffusers_compress.format import container
from diffusers_compress.format.limits import Limits

PAGE = Path(__file__).with_suffix(".html")


def byte_range(header, length):
    """(first byte, one past the last) of a Range header such as "bytes=5-99"; the whole file without one. ValueError if it is another kind."""
    if header is None:
        return 0, length
    first, _, last = header.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last) + 1 if last else length, length)
    if not 0 <= start < end:
        raise ValueError(header)
    return start, end


def server(data, pipe, port=8000):
    """The server of one file."""
    limits, alone = Limits(pixels=container.read_header(data)[0].width * container.read_header(data)[0].height), Lock()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, kind, body, **headers):
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": len(body), "Accept-Ranges": "bytes", **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            if self.path == "/":
                self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
            elif self.path != "/photo.dfc":
                self.answer(404, "text/plain", b"not here")
            else:
                header = self.headers.get("Range") if self.command == "GET" else None
                try:
                    start, end = byte_range(header, len(data))
                except ValueError:
                    self.answer(416, "text/plain", b"no such range", Content_Range=f"bytes */{len(data)}")
                    return
                part = {"Content_Range": f"bytes {start}-{end - 1}/{len(data)}"} if header else {}
                self.answer(206 if header else 200, "application/octet-stream", data[start:end], **part)

        do_HEAD = do_GET

        def do_POST(self):
            size = int(self.headers.get("Content-Length") or 0)
            if size > len(data):
                self.answer(413, "text/plain", b"more than the file has")
                return
            try:
                with alone:  # one picture at a time
                    picture = pipe.decompress(self.rfile.read(size), realism=0, limits=limits).images[0]
                self.answer(200, "image/png", png(picture))
            except BitstreamError as error:
                self.answer(422, "text/plain; charset=utf-8", str(error).encode())

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--bpp", type=float, default=0.2)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    pipe = DiffCPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    data = pipe.compress(Image.open(args.photo), target_bpp=args.bpp, num_coding_steps=24).bitstreams[0]
    print(f"http://127.0.0.1:{args.port}: {len(data):,} bytes")
    server(data, pipe, args.port).serve_forever()


if __name__ == "__main__":
    main()
