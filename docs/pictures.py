"""Writes docs/pictures.png: where SmolLM2 without six of its layers errs in an answer, before any training.

python -m docs.pictures
"""

import argparse
from io import BytesIO
from pathlib import Path

from PIL import Image

from examples import distill
from examples.smollm2 import PROMPTS, load_teacher, read_prompts, without_layers
from topk_rkl.plot import save_png

COLOURS = 128  # a palette keeps the file small


def main() -> None:
    teacher, tokenizer = load_teacher()
    prompts = {"held back": read_prompts(PROMPTS)["held back"][:1]}
    demo = distill.Demo(argparse.Namespace(k=32, length=48, seed=0), teacher, tokenizer, prompts)
    path = Path(__file__).with_suffix(".png")
    save_png(distill.errors(demo, without_layers(teacher, 24)), path)
    image = Image.open(BytesIO(path.read_bytes())).convert("RGB")
    image.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


if __name__ == "__main__":
    main()
