"""Saves the embedded model as a checkpoint in bfloat16, which is how released models come.

python experiments/studies/rates/save_model.py outputs/released
"""

import argparse

import torch

from selfdistill.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    model, tokenizer = load_model(name="embedded")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
