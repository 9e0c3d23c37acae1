"""The table of tasks: which model each one runs, and the settings people expect without asking for them."""

from dataclasses import dataclass

WIDE_480P = ((832, 480), (480, 832))
WIDE_720P = ((1280, 720), (720, 1280), *WIDE_480P)

DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class WanConfig:
    """What a task has: the published size of its DiT, what it is conditioned on, and its defaults."""

    name: str
    dim: int
    ffn_dim: int
    heads: int
    blocks: int
    in_channels: int = 16  # 16 of noise, and what it is conditioned on: mask 4 + image 16, or control 16 + image 16
    images: tuple[str, ...] = ()  # pictures that a video starts from or is spanned between: "first", "last"
    clip: bool = False  # the DiT has a branch that looks at CLIP features
    control: bool = False  # follows a control video
    steps: int = 50
    flow_shift: float = 5.0
    flow_shift_480p: float | None = None  # where 832x480 and 480x832 have a shift of their own
    guidance: float = 5.0  # with two models, that of the low-noise one
    guidance_high: float | None = None
    boundary: float | None = None  # noise level, 0 to 1, from which the high-noise model of a pair is used
    frames: int = 81
    sizes: tuple[tuple[int, int], ...] = WIDE_720P  # (width, height) that the weights were trained for
    negative_prefix: str = ""  # put before the default negative prompt


SMALL = (1536, 8960, 12, 30)
LARGE = (5120, 13824, 40, 40)
FIRST = {"images": ("first",), "steps": 40}

TASKS: dict[str, WanConfig] = {
    config.name: config
    for config in [
        WanConfig("t2v-14B", *LARGE),
        WanConfig("t2v-1.3B", *SMALL, sizes=WIDE_480P),
        WanConfig("t2i-14B", *LARGE, frames=1, sizes=(*WIDE_720P, (1024, 1024))),
        WanConfig("i2v-14B", *LARGE, in_channels=36, clip=True, flow_shift_480p=3.0, **FIRST),
        WanConfig(
            "flf2v-14B",
            *LARGE,
            in_channels=36,
            images=("first", "last"),
            clip=True,
            steps=40,
            negative_prefix="镜头切换，",
        ),
        WanConfig("t2v-1.3B-FC", *SMALL, in_channels=48, clip=True, control=True, sizes=WIDE_480P),
        WanConfig("t2v-14B-FC", *LARGE, in_channels=48, clip=True, control=True),
        WanConfig("i2v-14B-FC", *LARGE, in_channels=48, clip=True, control=True, flow_shift_480p=3.0, **FIRST),
        WanConfig("t2v-A14B", *LARGE, steps=40, flow_shift=12.0, guidance=3.0, guidance_high=4.0, boundary=0.875),
        WanConfig("i2v-A14B", *LARGE, in_channels=36, guidance=3.5, guidance_high=3.5, boundary=0.900, **FIRST),
    ]
}


def default_flow_shift(config: WanConfig, width: int, height: int) -> float:
    """Return the flow shift for a size in pixels, as it was asked for: i2v has another at 832x480 and 480x832."""
    if config.flow_shift_480p is not None and (width, height) in WIDE_480P:
        return config.flow_shift_480p
    return config.flow_shift
