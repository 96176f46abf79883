"""The schema of every command's config, and its validation: Hydra and OmegaConf stop here.

`training`, `evaluating` and `sampling` take what `hydra.compose` gives and return plain dataclasses, or raise a
`UserError` that names the key, the value seen and what would be right.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from sparse_tx.attention.heads import KINDS
from sparse_tx.data.spec import DataSpec, check_mirror
from sparse_tx.errors import UserError
from sparse_tx.merge import typed
from sparse_tx.model.spec import RECOMPUTE, AttentionSpec, ModelSpec

SPLITS = ("train", "validation", "test")
WEIGHTS = ("ema", "live")


@dataclass
class TwinConfig:
    context: int = MISSING
    stride: int = MISSING
    c: int = MISSING


@dataclass
class DataConfig:
    name: str = MISSING
    kind: str = MISSING
    root: str = "data"
    source: str | None = None
    version: str | None = None
    context: int = MISSING
    stride: int | None = None
    c: int | None = None
    batch_size: int = MISSING
    workers: int = 0
    limit: int | None = None
    unreadable: str = "refuse"
    mirror: bool = False
    synthetic: bool = False
    overfit: bool = False
    twin: TwinConfig = field(default_factory=TwinConfig)

    def spec(self) -> DataSpec:
        return DataSpec(
            name=self.name,
            kind=self.kind,
            context=self.context,
            root=self.root,
            source=self.source,
            version=self.version,
            unreadable=self.unreadable,
            synthetic=self.synthetic,
        )


@dataclass
class AttentionConfig:
    name: str = MISSING
    stride: int | None = None
    c: int | None = None
    reach: int | None = None
    global_tokens: int | None = None
    combine: str = "merged"
    order: list[str] | None = None
    backend: str = "auto"


@dataclass
class ModelConfig:
    name: str = MISSING
    layers: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    qk: int = MISSING
    ff: int = MISSING
    dropout: float = 0.0
    recompute: str = "none"
    qk_norm: bool = False
    rotary: str = "none"
    activation: str = "gelu"
    init: str = "paper"


@dataclass
class OptimizerConfig:
    name: str = MISSING
    lr: float = MISSING
    warmup: int | None = None
    hold: float = 0.0
    decay: str = "cosine"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    clip: float = 1.0


@dataclass
class TrainerConfig:
    accelerator: str = "auto"
    devices: str = "1"
    strategy: str = "auto"
    precision: str = "auto"
    fused: str = "auto"
    residual: str = "float32"
    compile: str = "auto"
    cuda_graph: str = "auto"
    max_steps: int = MISSING
    max_time: str | None = None
    ema_decay: float = 0.999


@dataclass
class CsvConfig:
    pass


@dataclass
class WandbConfig:
    project: str = "sparse-tx"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    offline: bool | None = None
    checkpoints: bool = False


@dataclass
class TensorboardConfig:
    pass


@dataclass
class LoggerConfig:
    csv: CsvConfig | None = None
    wandb: WandbConfig | None = None
    tensorboard: TensorboardConfig | None = None


@dataclass
class CallbacksConfig:
    log_every: int = 20
    validate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    sample_every: int | None = None
    sample_count: int = 8
    sample_length: int | None = None


@dataclass
class ScoringConfig:
    min_context: int = 0
    batch_size: int | None = None


@dataclass
class SlurmConfig:
    partition: str | None = None
    account: str | None = None
    timeout_min: int = 1440
    gpus: int = 1
    cpus: int = 8
    mem_gb: int | None = None


@dataclass
class SweepConfig:
    params: dict[str, Any] = field(default_factory=dict)
    trials: int | None = None
    sampler: str = "tpe"
    launcher: str = "here"
    parallel: int = 1
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class TrainConfig:
    """Everything that a training run is made of."""

    data: DataConfig = field(default_factory=DataConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig | None = None
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    evaluation: ScoringConfig = field(default_factory=ScoringConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 1
    name: str = MISSING
    output: str = "outputs"
    resume: str | None = None
    dry_run: bool = False
    profile: bool = False
    debug: str | None = None

    def model_spec(self) -> ModelSpec:
        """model.recompute=auto is "none" here: the model is the same, and a run decides by its device's memory."""
        order = self.attention.order
        attention = {**dataclasses.asdict(self.attention), "order": None if order is None else tuple(order)}
        model = dataclasses.asdict(self.model)
        model.pop("name")
        if model["recompute"] == "auto":
            model["recompute"] = "none"
        return ModelSpec(kind=self.data.kind, context=self.data.context, attention=AttentionSpec(**attention), **model)

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return dataclasses.asdict(self)


@dataclass
class SweepOnly:
    sweep: SweepConfig = field(default_factory=SweepConfig)
    output: str = "outputs"
    seed: int = 1


@dataclass
class DataOverride:
    root: str | None = None
    source: str | None = None


@dataclass
class ScoringOverride:
    min_context: int | None = None


@dataclass
class EvaluateConfig:
    checkpoint: str = MISSING
    split: str = "validation"
    weights: str = "ema"
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    limit: int | None = None
    debug: str | None = None
    data: DataOverride = field(default_factory=DataOverride)
    evaluation: ScoringOverride = field(default_factory=ScoringOverride)


@dataclass
class SampleConfig:
    checkpoint: str = MISSING
    count: int = 16
    batch_size: str = "auto"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1
    length: int | None = None
    prompt: str | None = None
    prompt_length: int | None = None
    format: str | None = None
    weights: str = "ema"
    device: str = "auto"
    precision: str = "auto"
    output: str | None = None
    debug: str | None = None


@dataclass
class ExportConfig:
    checkpoint: str = MISSING
    to: str = MISSING
    repo: str | None = None
    private: bool = True
    weights: str = "ema"
    split: str | None = "validation"
    limit: int | None = None
    samples: int = 4
    length: int | None = None
    temperature: float = 1.0
    seed: int = 1
    device: str = "auto"
    debug: str | None = None
    data: DataOverride = field(default_factory=DataOverride)


def config_folder() -> Path:
    """The folder of the YAML files: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"the config files are missing: neither {here / 'configs'} nor {here.parent / 'configs'} has them")


def training(cfg: DictConfig) -> TrainConfig:
    """A composed `train` config, checked whole: each key, each type, and what must fit together."""
    config = typed(cfg, TrainConfig)
    if config.attention.name not in KINDS:
        raise UserError(f"attention={config.attention.name} is not known: use one of {', '.join(KINDS)}")
    _one_of("model.recompute", config.model.recompute, ("auto", *RECOMPUTE))
    try:
        config.model_spec()
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_name(config.name)
    data, optimizer, trainer, callbacks = config.data, config.optimizer, config.trainer, config.callbacks
    _at_least(
        {
            "data.batch_size": (data.batch_size, 1),
            "data.workers": (data.workers, 0),
            "data.limit": (data.limit, 1),
            "trainer.max_steps": (trainer.max_steps, 1),
            "optimizer.warmup": (optimizer.warmup, 0),
            "optimizer.weight_decay": (optimizer.weight_decay, 0),
            "callbacks.log_every": (callbacks.log_every, 1),
            "callbacks.validate_every": (callbacks.validate_every, 1),
            "callbacks.checkpoint_every": (callbacks.checkpoint_every, 1),
            "callbacks.keep": (callbacks.keep, 1),
            "callbacks.sample_every": (callbacks.sample_every, 1),
            "callbacks.sample_count": (callbacks.sample_count, 1),
            "callbacks.sample_length": (callbacks.sample_length, 1),
            "evaluation.batch_size": (config.evaluation.batch_size, 1),
        }
    )
    if (callbacks.sample_length or 1) > data.context:
        raise UserError(
            f"callbacks.sample_length={callbacks.sample_length}: a sample has at most the {data.context} bytes of the "
            "context"
        )
    _one_of("data.unreadable", data.unreadable, ("refuse", "skip"))
    if data.mirror:
        check_mirror(data.name, data.kind)
    _one_of("optimizer", optimizer.name, ("adamw", "muon"))
    _one_of("optimizer.decay", optimizer.decay, ("cosine", "linear"))
    if not 0 <= optimizer.hold <= 1:
        raise UserError(f"optimizer.hold={optimizer.hold}: it is a share of the steps after the warm-up, 0 to 1")
    _one_of("trainer.accelerator", trainer.accelerator, ("auto", "cpu", "gpu"))
    _one_of("trainer.strategy", trainer.strategy, ("auto", "ddp"))
    trainer.precision = _precision("trainer.precision", trainer.precision)
    for key in ("fused", "compile", "cuda_graph"):
        setattr(trainer, key, getattr(trainer, key).lower())
        _one_of(f"trainer.{key}", getattr(trainer, key), ("auto", "true", "false"))
    _one_of("trainer.residual", trainer.residual, ("float32", "bfloat16"))
    if trainer.devices != "auto" and not (trainer.devices.isdigit() and int(trainer.devices) >= 1):
        raise UserError(f"trainer.devices={trainer.devices}: give a number of at least 1, or auto for all there are")
    if trainer.max_time is not None and not re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", trainer.max_time):
        raise UserError(f"trainer.max_time={trainer.max_time}: give days, hours, minutes and seconds as 00:00:20:00")
    for key, value in (("optimizer.lr", optimizer.lr), ("optimizer.clip", optimizer.clip)):
        if not value > 0:
            raise UserError(f"{key}={value}: it must be above 0")
    if not 0 <= trainer.ema_decay < 1:
        raise UserError(f"trainer.ema_decay={trainer.ema_decay}: it must be at least 0 and below 1")
    if config.profile and trainer.max_steps < 5:
        raise UserError(
            f"profile=true traces steps 3 to 5: trainer.max_steps={trainer.max_steps} ends before; use 5 or more"
        )
    _min_context("evaluation.min_context", config.evaluation.min_context, data.context)
    return config


def sweeping(cfg: DictConfig) -> tuple[SweepConfig, str, int]:
    """Of a composed `train` config, which need not be whole: how to sweep, where to, and by which seed."""
    given = OmegaConf.create({"sweep": cfg.sweep, "output": cfg.output, "seed": cfg.seed})
    config = typed(given, SweepOnly)
    _at_least(
        {
            "sweep.trials": (config.sweep.trials, 1),
            "sweep.parallel": (config.sweep.parallel, 1),
            "sweep.slurm.timeout_min": (config.sweep.slurm.timeout_min, 1),
            "sweep.slurm.gpus": (config.sweep.slurm.gpus, 0),
            "sweep.slurm.cpus": (config.sweep.slurm.cpus, 1),
        }
    )
    _one_of("sweep.sampler", config.sweep.sampler, ("tpe", "random"))
    _one_of("sweep.launcher", config.sweep.launcher, ("here", "local", "slurm"))
    return config.sweep, config.output, config.seed


def evaluating(cfg: DictConfig) -> EvaluateConfig:
    """A composed `evaluate` config, checked."""
    config = typed(cfg, EvaluateConfig, shared="debug" in cfg)
    _one_of("split", config.split, SPLITS)
    _check_checkpoint_keys(config)
    config.precision = _precision("precision", config.precision)
    _at_least({"batch_size": (config.batch_size, 1), "limit": (config.limit, 1)})
    return config


def sampling(cfg: DictConfig) -> SampleConfig:
    """A composed `sample` config, checked."""
    config = typed(cfg, SampleConfig, shared="debug" in cfg)
    _check_checkpoint_keys(config)
    for key, value in (("prompt", config.prompt), ("output", config.output), ("format", config.format)):
        if value == "":
            raise UserError(f"{key} is empty: give a value, or leave it out")
    _at_least(
        {
            "count": (config.count, 1),
            "temperature": (config.temperature, 0),
            "top_k": (config.top_k, 1),
            "length": (config.length, 1),
            "prompt_length": (config.prompt_length, 1),
        }
    )
    if config.batch_size != "auto" and not (config.batch_size.isdigit() and int(config.batch_size) >= 1):
        raise UserError(f"batch_size={config.batch_size}: give a number of at least 1, or auto for what fits")
    config.precision = _precision("precision", config.precision)
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise UserError(f"top_p={config.top_p}: it is a share of the probability, above 0 and at most 1")
    return config


def exporting(cfg: DictConfig) -> ExportConfig:
    """A composed `export` config, checked."""
    config = typed(cfg, ExportConfig, shared="debug" in cfg)
    _check_checkpoint_keys(config)
    if config.split is not None:
        _one_of("split", config.split, SPLITS)
    least = {"limit": (config.limit, 1), "samples": (config.samples, 0), "length": (config.length, 1)}
    _at_least(least | {"temperature": (config.temperature, 0)})
    if (config.to == "hub") != (config.repo is not None):
        raise UserError(f"to={config.to}, repo={config.repo}: give to=hub and repo=USER/NAME together, or to=FOLDER")
    if config.repo is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.repo, re.ASCII):
        raise UserError(f"repo={config.repo} is no name of a repository: give USER/NAME")
    return config


def _check_checkpoint_keys(config: EvaluateConfig | SampleConfig | ExportConfig) -> None:
    _one_of("weights", config.weights, WEIGHTS)
    _one_of("device", config.device.partition(":")[0], ("auto", "cpu", "cuda"))
    if config.debug is not None:
        _one_of("debug", config.debug, ("fast",))


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise UserError(f"name={name!r}: it becomes a folder; use letters, digits, dots, _ and - alone")


def _min_context(key: str, value: int, context: int) -> None:
    if not 0 <= value < context:
        raise UserError(f"{key}={value}: it must be at least 0 and below the context, {context}")


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{key}={value} is not known: use one of {', '.join(known)}")


def _at_least(values: dict[str, tuple[float | None, int]]) -> None:
    for key, (value, least) in values.items():
        if value is not None and not value >= least:
            raise UserError(f"{key}={value}: it must be at least {least}")


def _precision(key: str, value: str) -> str:
    names = {"auto": "auto", "32": "32", "32-true": "32", "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed"}
    names |= {"16": "16-mixed", "16-mixed": "16-mixed"}
    if value not in names:
        raise UserError(f"{key}={value} is not known: use one of auto, 32, bf16-mixed, 16-mixed")
    return names[value]
