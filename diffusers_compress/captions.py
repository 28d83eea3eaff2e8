"""Captions of pictures, from models that describe them."""

from collections.abc import Callable


def load_captioner(name: str, device: str = "cpu", max_tokens: int = 32) -> Callable[[list], list]:
    """A function from PIL pictures to captions, or to lists of token ids, which Text+Sketch takes as well.

    `name`: a Hub id or folder of a transformers captioner (BLIP, BLIP-2, GIT), such as "Salesforce/blip2-opt-2.7b-coco", or
    "open_clip:MODEL/PRETRAINED" for a CoCa model of open_clip, such as "open_clip:coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k".
    "invert:MODEL/PRETRAINED" finds ids by inversion, see `inversion.load_inverter`.
    """
    if name.startswith("invert:"):
        from diffusers_compress.inversion import load_inverter

        return load_inverter(name.removeprefix("invert:"), device)
    load = _open_clip_captioner if name.startswith("open_clip:") else _transformers_captioner
    caption = load(name.removeprefix("open_clip:"), device, max_tokens)
    return lambda pictures: [text.strip() for text in caption([picture.convert("RGB") for picture in pictures])]


def _transformers_captioner(name: str, device: str, max_tokens: int):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float16 if "cuda" in device else torch.float32)
    model = model.to(device).eval()

    @torch.no_grad()
    def caption(pictures):
        inputs = processor(images=pictures, return_tensors="pt").to(device, model.dtype)
        return processor.batch_decode(model.generate(**inputs, max_new_tokens=max_tokens), skip_special_tokens=True)

    return caption


def _open_clip_captioner(name: str, device: str, max_tokens: int):
    import open_clip
    import torch

    model_name, _, pretrained = name.partition("/")
    model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained or None, device=device)
    model.eval()

    tokenizer = open_clip.get_tokenizer(model_name)

    @torch.no_grad()
    def caption(pictures):
        # The likeliest next token each time; CoCa's own `generate` does not run with transformers 5
        image = torch.stack([transform(picture) for picture in pictures]).to(device)
        seen = model(image)
        tokens = torch.full((len(image), 1), tokenizer.sot_token_id, device=device)
        for _ in range(max_tokens):
            out = model(image, tokens, image_latent=seen["image_features"], image_embs=seen["image_embs"], output_labels=False)
            tokens = torch.cat([tokens, out["logits"][:, -1:].argmax(-1)], 1)
            if (tokens == tokenizer.eot_token_id).any(1).all():
                break
        rows = [row[1:] + [tokenizer.eot_token_id] for row in tokens.tolist()]
        return [tokenizer.decode(row[: row.index(tokenizer.eot_token_id)]) for row in rows]

    return caption
