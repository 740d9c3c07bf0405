"""Every setting of every command: typed, with its unit and its source. Used by the entries alone.

A value of `None` is filled in at the start of a run (`presets.resolve`), from the size of the archive where a comment
says so; RUN/config.yaml holds what came out (bands and statistics are in RUN/backbone.json).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssl_geo.commandline import parse
from ssl_geo.commandline import to_dict as to_dict
from ssl_geo.commandline import to_yaml as to_yaml
from ssl_geo.errors import one_line_errors
from ssl_geo.imagery.archives import refuse_addresses
from ssl_geo.resuming import read_settings, restarted_by_torchrun, resume_changes
from ssl_geo.schema import NonFinite


@dataclass
class ArchiveConfig:
    """Which imagery, and how its numbers become reflectance."""

    paths: list[str] = field(default_factory=list)
    """folders or files of GeoTIFF or JPEG 2000 scenes (short form: --data DIR ...)"""
    bands: list[str] | None = None
    """bands the backbone takes, in order; default: the ten of 10 and 20 m, B02 B03 B04 B05 B06 B07 B08 B8A B11 B12"""
    band_names: list[str] | None = None
    """names of the bands of files that name none, in file order; - for a layer that is no band"""
    level: Literal["L1C", "L2A"] | None = None
    """product level, whatever files tell; default: what their tags, metadata, names or B10 tell"""
    scale: float | None = None
    """reflectance = (DN + offset) * scale, whatever files tell; needed where they do not. Sentinel-2 integers: 1e-4"""
    offset: float | None = None
    """DN added before scaling, to all files, whatever they tell; default: what they tell, else 0, which is said; -1000
    from processing baseline 04.00 on"""
    nodata: NonFinite | None = None
    """value of unusable pixels in any band, instead of what files declare; integers that are 0 in all bands are
    unusable in any case"""
    chip_size: int | None = None
    """side of a chip in pixels of the finest grid (10 m); default: 64, on the embedded sample 32; that of packed
    chips"""
    min_valid: float = 0.9
    """least share of valid pixels of a chip"""
    allow_mixed: bool = False
    """take product levels or offsets that differ between scenes; each is read with its own offset"""
    max_unreadable: float = 0.01
    """largest share of unreadable scenes to go on with"""
    statistics_chips: int = 20_000
    """chips, drawn by seed, that the statistics are computed from"""
    cache: str = "~/.cache/ssl_geo"
    """folder where indexes are kept between runs"""

    def index_settings(self) -> dict[str, Any]:
        """What decides, beside the files, which chips there are: arguments of `build_index` but the bands."""
        names = "chip_size band_names level scale offset nodata min_valid allow_mixed max_unreadable statistics_chips"
        settings = {name: getattr(self, name) for name in names.split()}
        if self.chip_size is None:
            settings["chip_size"] = 64 if self.paths else 32  # the sample's fields are small: larger chips look alike
        return settings


@dataclass
class DataConfig(ArchiveConfig):
    """Which imagery, how its numbers become reflectance, and how it is fed."""

    paths: list[str] = field(default_factory=list)
    """folders or files of GeoTIFF or JPEG 2000 scenes, or one folder of packed chips (short form: --data DIR ...);
    none: the embedded sample"""
    labels: str | None = None
    """folder of label GeoTIFFs named like the scenes, only to watch a kNN score while training"""
    mean: list[float] | None = None
    """mean reflectance of each band for standardizing; default: that of the indexed chips"""
    std: list[float] | None = None
    """standard deviation of each band's reflectance; default: that of the indexed chips"""
    workers: int | None = None
    """loader processes of each rank; default: one less than the cores it has, at most 8"""


@dataclass
class ViewsConfig:
    """The multi-crop recipe (arXiv 2104.14294, section 3.1 and appendix E; Caron et al. 2020, arXiv 2006.09882)."""

    global_size: int | None = None
    """side of the two global views in pixels; default: the chip's, rounded down to the patch size"""
    local_size: int | None = None
    """side of the local views in pixels; default: half of the chip's, rounded down to the patch size"""
    local_count: int = 6
    """number of local views"""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """share of the chip's area that a global view covers"""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """share of the chip's area that a local view covers"""
    channel_repeat: float = 0.2
    """probability that the first global view shows one random band in all channels; the origin: 1"""
    rotate90: bool = True
    """rotate by multiples of 90 degrees and flip vertically too: seen from above there is no up"""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """probability of Gaussian blur in the first global, the second global and the local views"""
    solarize: float = 0.2
    """probability of solarizing the second global view"""
    season: float = 0.0
    """probability that the second global view and every second local view show the same place at another date, where
    the archive holds one"""
    backend: Literal["auto", "opencv", "torch"] = "auto"
    """opencv: the loader's processes make the views; torch: the device that trains makes them, from chips as stored;
    auto: torch on cuda, else opencv. The draws are the same, values differ by up to 1/64 pixel of interpolation"""


@dataclass
class BackboneConfig:
    """Any timm model."""

    name: str = "resnet10t"
    """name in timm; `python -c "import timm; print(timm.list_models('vit*'))"` lists them"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """further arguments of the timm model, for example {patch_size: 8}"""
    weights: str | None = None
    """run folder, checkpoint or file (.safetensors, .pth) of the same timm model to start from; filters go to the bands
    of their names, RGB filters are spread over the bands"""
    checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them: less memory, more time"""


@dataclass
class DINOConfig:
    """The method (arXiv 2104.14294). Defaults of None depend on the number of chips: see ssl_geo/presets.py."""

    out_dim: int | None = None
    """prototypes K; default: 1024 for fewer than 10,000 chips, 8192 for fewer than 200,000, else 65536"""
    hidden_dim: int = 2048
    """width of the head"""
    bottleneck_dim: int = 256
    """width before the prototypes"""
    norm_last_layer: bool = True
    """keep the prototypes at length 1"""
    freeze_last_layer_steps: int | None = None
    """steps at the start in which the prototypes stay as they are; default: a hundredth of the run"""
    teacher_momentum: float | None = None
    """EMA momentum of the teacher at the start; goes to 1 along a cosine; default: 0.99, from 200,000 chips on 0.996"""
    student_temp: float = 0.1
    """temperature of the student's softmax"""
    teacher_temp: float | None = None
    """temperature of the teacher's softmax after warm-up; default: 0.04"""
    warmup_teacher_temp: float | None = None
    """temperature of the teacher's softmax at the start of a warm-up; default: 0.04, or that after it where lower"""
    warmup_teacher_temp_steps: int = 0
    """steps of linear warm-up of the teacher's temperature"""
    center_momentum: float = 0.9
    """EMA momentum of the center"""
    one_pass_per_view: bool = False
    """forward each view alone: less memory, more time"""


@dataclass
class OptimConfig:
    """AdamW, one step after another."""

    batch_size: int = 64
    """chips a step, over all ranks"""
    accumulate: int = 1
    """micro-batches that a rank's share is split into"""
    lr: float | None = None
    """peak learning rate for a batch of 256; scaled by batch_size / 256. Default: the paper's 5e-4; for convolutional
    nets on fewer than 200,000 chips 1e-3 whatever the batch"""
    min_lr: float = 1e-6
    """learning rate at the end"""
    warmup_steps: int | None = None
    """steps of linear warm-up of the learning rate; default: a tenth of the run"""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """at the start and at the end of a cosine"""
    clip: float = 3.0
    """largest gradient norm of a single parameter tensor (as in the reference, not of all together); 0: no clipping"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """number format of the forward pass; auto: bf16 where the hardware computes it, else fp32"""
    compile: bool = False
    """torch.compile the backbone: minutes at the start, faster steps on a GPU"""
    max_skipped: int = 5
    """non-finite steps in a row before the run is given up; looked at when a log line is due"""


@dataclass
class LogConfig:
    """What is written how often, in steps."""

    every: int = 10
    """log line and curves"""
    health_every: int = 50
    """measures of the embeddings"""
    checkpoint_every: int = 500
    """checkpoints; one is always written at the end and on SIGTERM, SIGINT, SIGHUP or SIGUSR1"""
    keep: int = 2
    """checkpoints kept"""


@dataclass
class PretrainConfig:
    """Pretrain a backbone on unlabelled imagery with DINO."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    dino: DINOConfig = field(default_factory=DINOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    out: str | None = None
    """run folder to make; default: runs/pretrain-DATE-TIME"""
    resume: str | None = None
    """run folder to go on with, from its last checkpoint and its settings"""
    resume_changed: bool = False
    """go on although settings given beside --resume change the result; each is said, and RUN/config.yaml holds them
    from then on"""
    steps: int | None = None
    """optimizer steps of the whole run; default: 100 epochs, 100 steps on the embedded sample"""
    seed: int = 0
    """of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto: cuda where there is one"""


@dataclass
class SplitConfig:
    """Which chips train, choose and test: by place, so that neighbours and repeated dates stay together."""

    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """shares of train, val and test"""
    block: float | None = None
    """side of the square blocks of ground that go to one split, in metres (pixels without georeferencing);
    default: two chips"""
    gap: float = 0.0
    """chips nearer than this to those of another split are left out, in the same unit"""
    file: str | None = None
    """JSON of given splits, {"image name without suffix": "train" | "val" | "test"}"""


@dataclass
class ImageConfig:
    """How the images' numbers become reflectance; what is given goes before what files tell."""

    band_names: list[str] | None = None
    """names of the bands of files that name none, in file order; - for a layer that is no band"""
    level: Literal["L1C", "L2A"] | None = None
    """product level"""
    scale: float | None = None
    """reflectance = (DN + offset) * scale; Sentinel-2 integers: 1e-4, reflectance as stored: 1"""
    offset: float | None = None
    """DN added before scaling, to all files"""
    nodata: NonFinite | None = None
    """value of unusable pixels in any band; integers that are 0 in all bands are unusable in any case"""


@dataclass
class ProbeConfig:
    """Ask what a frozen backbone's features are worth: segmentation heads on labelled imagery, against baselines."""

    ckpt: str
    """run folder or checkpoint of ssl_geo.pretrain; timm:NAME for a timm model with its published weights, random:NAME
    for an untrained one"""
    images: list[str] = field(default_factory=list)
    """folders or files of labelled scenes; none: the embedded sample"""
    labels: list[str] = field(default_factory=list)
    """folders or files of label GeoTIFFs named like the scenes"""
    align: bool = False
    """warp labels to the grid of their image by nearest neighbour"""
    classes: list[int] | None = None
    """ids of the classes; default: those found"""
    ignore: list[int] | None = None
    """ids that are no class"""
    out: str | None = None
    """folder of the report; default: runs/probe-DATE-TIME"""
    heads: list[str] = field(default_factory=lambda: ["linear", "conv_block"])
    """segmentation heads: linear, patch_linear, conv_block, fpn, dpt"""
    layers: list[str] = field(default_factory=lambda: ["auto"])
    """layers of the backbone by index or name; auto: up to four, of a pyramid the last ones down to 1/16 of the image,
    and what --enlarge makes as fine (not with dpt, which takes four); list: print them and stop"""
    seeds: int = 3
    """runs of each head"""
    epochs: int = 10
    """passes over the training chips"""
    batch_size: int = 16
    """chips a step"""
    lr: float = 1e-3
    """peak learning rate of the heads"""
    class_weights: bool = False
    """weigh classes by the inverse square root of their frequency in the loss"""
    chip_size: int | None = None
    """side of a chip in pixels; default: the checkpoint's, on the embedded sample 120, less what no patch covers"""
    context: int = 0
    """pixels around each chip that the backbone sees too: better features along its edges, for more time"""
    enlarge: int = 1
    """show the backbone its images so many times as high and wide: dense features on a grid as much finer, for the
    square of the time"""
    pixels: bool = False
    """let the linear probe read each pixel's own bands, logs and indices beside the layers: for fine structures"""
    split: SplitConfig = field(default_factory=SplitConfig)
    data: ImageConfig = field(default_factory=ImageConfig)
    cache: str = "~/.cache/ssl_geo"
    """folder where features are kept between runs"""
    memory: float = 4.0
    """GB of features that are held in memory; more stay memory-mapped"""
    results: str = "runs/results.jsonl"
    """table that a line is appended to for each probe"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto: cuda where there is one"""


@dataclass
class PackConfig:
    """Write the chips of an archive once into a folder that training reads without decoding: give it to --data."""

    data: ArchiveConfig = field(default_factory=ArchiveConfig)
    out: str | None = None
    """folder of packed chips to make; one that was left unfinished is gone on with"""
    verify: str | None = None
    """packed folder whose checksums are to be verified; nothing is written"""
    shard_mb: int = 256
    """largest size of a shard file in MB"""
    workers: int | None = None
    """threads that read; default: the number of cores, at most 8"""
    seed: int = 0
    """of the chips that the statistics are computed from, as in pretraining"""


@dataclass
class DoctorConfig:
    """Look through an archive before a long run. Exit code 0: clean, 1: worth a look, 2: trouble for a run."""

    paths: list[str] = field(default_factory=list)
    """folders or files of scenes; written before the first option; none: the embedded sample with its labels"""
    labels: list[str] = field(default_factory=list)
    """folders or files of label rasters named like the scenes"""
    classes: list[int] | None = None
    """ids that the labels may hold; default: any"""
    ignore: list[int] | None = None
    """ids that are no class"""
    split: str | None = None
    """JSON of given splits as in the probe's --split.file: what they share is an error"""
    out: str | None = None
    """folder for doctor.json and doctor.html"""
    quick: bool = False
    """headers and a few windows only: finds no truncated file and no duplicate"""
    data: ImageConfig = field(default_factory=ImageConfig)
    workers: int | None = None
    """threads; default: the number of processors, at most 8"""


@dataclass
class PredictConfig:
    """Map scenes of any size with the head that a probe chose, or write down what its backbone sees in them."""

    head: str
    """folder best_head that ssl_geo.probe leaves in its --out"""
    scene: list[str]
    """scenes to map: files, folders, patterns such as "2023/*.tif\""""
    out: str
    """file to make (.tif; .parquet of chips) for one scene, or folder for any number of them"""
    confidence: bool = False
    """write the probability of the class that won too, in percent: NAME.confidence.tif"""
    probabilities: bool = False
    """write the probability of every class too, one band each: NAME.probabilities.tif"""
    embed: Literal["pca", "tokens", "chips"] | None = None
    """instead of classes: principal components of a layer's features or the features themselves as GeoTIFF on the
    layer's grid, or one embedding a chip as GeoParquet"""
    layer: str | None = None
    """layer whose features pca and tokens take; default: the deepest that the head reads"""
    components: int | None = None
    """number of channels of pca (default 3) and tokens (default all)"""
    basis: str | None = None
    """principal components that an earlier --embed pca left as pca.safetensors, so that colours can be compared;
    default: fitted on all scenes of the call"""
    overlap: float = 0.25
    """share of a tile that the next one covers too, 0 to 0.5; more is smoother and slower"""
    batch_size: int = 32
    """tiles at once"""
    data: ImageConfig = field(default_factory=ImageConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto: cuda where there is one"""


PROGRAM = "ssl_geo.pretrain"


def pretrain_config(argv: list[str] | None = None) -> PretrainConfig:
    """Settings of `python -m ssl_geo.pretrain`; with `--resume RUN` those of RUN, with the options given on top."""
    argv = sys.argv[1:] if argv is None else argv
    short = {"--data": "--data.paths"}
    usage = f"python -m {PROGRAM} [--config RECIPE.yaml] [--data DIR ...] [--out RUN] [--SETTING VALUE ...]"
    config = parse(PretrainConfig, PROGRAM, argv, short, usage)
    _make_paths_absolute(config)
    with one_line_errors(PROGRAM):
        if restarted_by_torchrun(config.out, config.resume):
            config.resume = config.out
            argv = [*argv, "--resume", str(config.out)]
        if config.resume is None:
            return config
        before = read_settings(config.resume)
        recipe = Path(config.resume) / "config.yaml"
        resumed = parse(PretrainConfig, PROGRAM, ["--config", str(recipe), *argv], short, usage)
        _make_paths_absolute(resumed)
        if "backend" not in before.get("views", {}) and resumed.views.backend == "auto":
            resumed.views.backend = "opencv"
        resume_changes(to_dict(resumed), to_dict(PretrainConfig()))
    return resumed


def _make_paths_absolute(config: PretrainConfig) -> None:
    """What RUN/config.yaml names is found again from wherever the run is resumed."""
    with one_line_errors(PROGRAM):
        refuse_addresses("--data", config.data.paths)
        refuse_addresses("--data.labels", [config.data.labels or ""])
        refuse_addresses("--backbone.weights", [config.backbone.weights or ""])
    config.data.paths = [str(Path(path).absolute()) for path in config.data.paths]
    if config.data.labels is not None:
        config.data.labels = str(Path(config.data.labels).absolute())
    if config.backbone.weights is not None:
        config.backbone.weights = str(Path(config.backbone.weights).absolute())


PACK_PROGRAM = "ssl_geo.pack"


def pack_config(argv: list[str] | None = None) -> PackConfig:
    """Settings of `python -m ssl_geo.pack`."""
    usage = f"python -m {PACK_PROGRAM} --data DIR [DIR ...] --out FOLDER [--SETTING VALUE ...] | --verify FOLDER"
    argv = sys.argv[1:] if argv is None else argv
    config = parse(PackConfig, PACK_PROGRAM, argv, {"--data": "--data.paths"}, usage)
    with one_line_errors(PACK_PROGRAM):
        refuse_addresses("--data", config.data.paths)
    return config


PROBE_PROGRAM = "ssl_geo.probe"


def probe_config(argv: list[str] | None = None) -> ProbeConfig:
    """Settings of `python -m ssl_geo.probe`."""
    usage = f"python -m {PROBE_PROGRAM} --ckpt RUN [--images DIR --labels DIR] [--out OUT] [--SETTING VALUE ...]"
    argv = sys.argv[1:] if argv is None else argv
    config = parse(ProbeConfig, PROBE_PROGRAM, argv, {}, usage)
    with one_line_errors(PROBE_PROGRAM):
        refuse_addresses("--images", config.images)
        refuse_addresses("--labels", config.labels)
    return config


DOCTOR_PROGRAM = "ssl_geo.doctor"


def doctor_config(argv: list[str] | None = None) -> DoctorConfig:
    """Settings of `python -m ssl_geo.doctor`."""
    usage = f"python -m {DOCTOR_PROGRAM} [PATH ...] [--labels PATH ...] [--quick] [--out OUT] [--SETTING VALUE ...]"
    argv = sys.argv[1:] if argv is None else argv
    config = parse(DoctorConfig, DOCTOR_PROGRAM, argv, {}, usage, positional="--paths")
    with one_line_errors(DOCTOR_PROGRAM):
        refuse_addresses("PATH", config.paths)
        refuse_addresses("--labels", config.labels)
    return config


PREDICT_PROGRAM = "ssl_geo.predict"


def predict_config(argv: list[str] | None = None) -> PredictConfig:
    """Settings of `python -m ssl_geo.predict`."""
    usage = f"python -m {PREDICT_PROGRAM} --head OUT/best_head --scene SCENE ... --out MAP [--SETTING VALUE ...]"
    argv = sys.argv[1:] if argv is None else argv
    config = parse(PredictConfig, PREDICT_PROGRAM, argv, {}, usage)
    with one_line_errors(PREDICT_PROGRAM):
        refuse_addresses("--scene", config.scene)
    return config
