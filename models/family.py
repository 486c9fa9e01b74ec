"""What makes components a model: one `Family` for all models that are sampled in the same way.

A family is one object in `models/<family>/family.py`, listed in `models/families.py`. Finding a
model, loading, quantizing, sampling, adapters and checkpoints with random weights take what they
need from it and from the files.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from models.checkpoint_io import Rule
from models.component import Component
from models.denoiser import Denoiser

LONGEST_SIDE = 8192  # pixels; positions and memory end long before


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What sampling uses for arguments that are left out."""

    num_inference_steps: int = 28
    guidance_scale: float = 3.5  # distilled; only for models with guidance embedding
    true_cfg_scale: float = 1.0  # classifier-free; 1 is off
    strength: float = 0.6  # only with an initial image
    height: int = 1024  # pixels
    width: int = 1024  # pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer that a family is published with."""

    kind: str  # its class of transformers, as model_index.json has it
    length: int  # tokens of a text, as tokenizer_config.json has them
    # tokens beside those of bytes, the padding first, of which one for tests is made; () where
    # checkpoints with random weights copy a tokenizer
    specials: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Noise levels that a family is published with, and the settings that go with them."""

    name: str  # in words, whose they are: "FLUX.1-dev's"
    scheduler: Mapping[str, Any]  # contents of the published scheduler_config.json
    defaults: Mapping[str, Any]  # of GenerationDefaults: num_inference_steps and the like
    # what model_index.json says of it, beside the components
    index: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The models that one `Denoiser` samples: their components and all that is known of them.

    Functions take configs, which are those of the components by name, as far as they are there.
    """

    name: str  # in words, for errors: "FLUX.1"
    # `_class_name`s in model_index.json; the first is written
    pipelines: tuple[str, ...]
    # by their folders' names, in the order in which they are loaded
    components: Mapping[str, Component]
    tokenizers: Mapping[str, Tokenizer]  # by their folders' names; {} without text
    denoiser: type[Denoiser]  # is made with `configs`, and samples
    schedules: Mapping[str, Schedule]  # as --schedule names them; the first is the common one
    # from configs, perhaps with the scheduler, and model_index.json to the schedule that a model
    # takes which doesn't say it, and a warning where that is a guess
    schedule_of: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[str, str | None]]
    # which schedule's defaults go with a scheduler and the model_index.json beside it
    schedule_like: Callable[[Any, Mapping[str, Any]], str]
    # why components don't fit each other, from configs and tokenizers alone
    misfits: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterator[str]]
    # configs of every component by the published model's name, which its single file has too
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # from configs to those of GenerationDefaults that sizes tell, over the schedule's
    defaults_of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda configs: {}
    # from model_index.json to what the denoiser needs of it, by name: configs beside components';
    # raises CheckpointError
    index_configs: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda index: {}
    autoencoder_file: str = "ae.safetensors"  # beside a single file
    # the namings that adapters use for the main component's linears
    adapters: Sequence["AdapterNaming"] = ()
    main: str = "transformer"  # the component that is sampled with
    autoencoder: str = "vae"

    @property
    def index(self) -> dict[str, Any]:
        """Contents of the model_index.json that diffusers writes."""
        entries = {name: [x.library, x.classes[0]] for name, x in self.components.items()}
        entries |= {name: ["transformers", x.kind] for name, x in self.tokenizers.items()}
        scheduler = next(iter(self.schedules.values())).scheduler["_class_name"]
        entries["scheduler"] = ["diffusers", scheduler]
        return {"_class_name": self.pipelines[0], **dict(sorted(entries.items()))}

    @property
    def encoders(self) -> tuple[str, ...]:
        """The components besides the main one and the autoencoder."""
        return tuple(x for x in self.components if x not in (self.main, self.autoencoder))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterNaming:
    """A naming that adapters (LoRA) use for the main component's linears."""

    rules: Callable[[Any], Sequence[Rule]]  # from its config
    prefixes: tuple[str, ...]  # that may stand before a module's name, "" among them
    flat: str  # kohya's prefix, behind which the module's dots are underscores
