"""`llava-mini profile video`: frames a second of the video pipeline, beside the release's loop."""

import argparse

from llava_mini_jax.arguments import JSON, Kind
from llava_mini_jax.terminal import loading, print_json, waiting

USAGE = "llava-mini profile video [MODEL] [--video FILE] [options]"
EXAMPLE = "llava-mini profile video MODEL --video clip.mp4 --chunk 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a model's folder (default: random weights)")
    add("--video", metavar="FILE", help="a video file (default: noise, which is not decoded)")
    add("--frames", type=int, default=64, metavar="N", help="default: 64")
    add("--chunk", type=int, default=8, metavar="N", help="frames a chunk (default: 8)")
    add("--text", type=int, default=64, metavar="T", help="tokens of text (default: 64)")
    add("--repeats", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    add("--json", action="store_true", help=JSON)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from llava_mini_jax.cost import video_speed
    from llava_mini_jax.inference.model import load

    if args.model:
        with loading(args.model) as watch:
            model = load(args.model, watch=watch)
        params, bundle = model.params, model.bundle
    else:
        params, bundle = video_speed.small(args.text)
    images, reading = bundle.images, {}
    if args.video:
        pixels, reading = video_speed.read_frames(args.video, bundle, args.frames)
    else:
        shape = (args.frames, images.parts, images.size, images.size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with waiting("measuring"):
        speed = video_speed.measure(
            params, bundle.model, pixels, text=args.text, chunk=args.chunk, repeats=args.repeats
        )
    if args.json:
        print_json({"seconds a frame": reading | speed.seconds, "frames": len(pixels)})
    else:
        print(*video_speed.lines(reading, speed), sep="\n")
    return 0


KIND = Kind("frames a second, compared with the release's loop", add_arguments, run)
