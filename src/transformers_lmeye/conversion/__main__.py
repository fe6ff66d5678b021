"""Converts a released LMEye checkpoint (LingCloud, `.pth`) into this package's format.

    python -m transformers_lmeye.conversion --checkpoint lmeye-llama7b.pth --output lmeye-llama-7b \\
        --vision openai/clip-vit-large-patch14 --language huggyllama/llama-7b

    python -m transformers_lmeye.conversion --checkpoint lmeye-v0.1.pth --output lmeye-flan-t5-xl \\
        --vision Salesforce/blip2-flan-t5-xl --clip-text openai/clip-vit-large-patch14
"""

import argparse
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from .converting import convert


@dataclass
class ConversionArguments:
    checkpoint: str = field(metadata={"help": "The released .pth file."})
    output: str = field(metadata={"help": "The folder to write; it must not exist yet."})
    vision: str = field(metadata={"help": "Hub id or folder: the CLIP of a v1 file, the BLIP-2 of a v0.1 file."})
    language: str | None = field(default=None, metadata={"help": "Hub id or folder of a v1 file's language model."})
    clip_text: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the CLIP whose text encoder a v0.1 file uses."}
    )
    stage1: str | None = field(
        default=None, metadata={"help": "The stage-1 file of a stage-2 file that lacks the static mapping."}
    )
    whole: bool = field(default=False, metadata={"help": "Write the frozen backbones too, not the network alone."})
    add_bos: bool = field(default=False, metadata={"help": "Start prompts with bos, as some LLaMA releases do."})


def main() -> None:
    parser = HfArgumentParser(
        ConversionArguments,
        prog="python -m transformers_lmeye.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        folder = convert(
            arguments.checkpoint,
            arguments.output,
            arguments.vision,
            arguments.language,
            arguments.clip_text,
            stage1=arguments.stage1,
            whole=arguments.whole,
            add_bos=arguments.add_bos,
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"Written to {folder}.")


if __name__ == "__main__":
    main()
