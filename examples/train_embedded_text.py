"""The embedded model's text encoder: small, random, and never trained; a denoiser that ignores prompts needs no more."""

import json

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RANDOM_TEXTS = 255


def make_tokenizer(folder):
    """A CLIP tokenizer whose vocabulary is the 256 bytes, each alone and at a word's end: any text, no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]  # GPT-2's byte alphabet
    tokens = symbols + [s + "</w>" for s in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return load_tokenizer(folder)


def load_tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


def make_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def embed_texts(text_encoder, tokenizer, device):
    """[1 + RANDOM_TEXTS, 77, 64]: the empty prompt, then random strings."""
    generator = torch.Generator().manual_seed(0)
    texts = [""]
    for _ in range(RANDOM_TEXTS):
        length = int(torch.randint(1, 60, (), generator=generator))
        texts.append("".join(chr(c) for c in torch.randint(32, 127, (length,), generator=generator).tolist()))
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    return torch.cat([text_encoder(part)[0] for part in ids.split(32)])
