"""The command `app`."""

from importlib.util import find_spec
from typing import Annotated

import typer

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import Device, Dtype, Model
from diffusers_compress.cli.terminal import quieten_libraries

Port = Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")]
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")]


def app_command(
    host: Host = "127.0.0.1", port: Port = 7860, model: Model = None, device: Device = None, dtype: Dtype = "float32"
):
    """A page to try the codecs in a browser. Needs the extra `app`."""
    if find_spec("gradio") is None:
        raise ValueError('the page needs gradio: pip install "diffusers_compress[app]"')
    from diffusers_compress import app

    quieten_libraries()
    engine = app.Engine(model and loading.model_source(model), loading.device_of(device), dtype)
    app.serve(app.build(engine), server_name=host, server_port=port)
