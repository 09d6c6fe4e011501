"""The run's configuration: every key with its type, default and meaning, read from YAML and the command line.

The keys are those of the official code (facebookresearch/coconut, args/*.yaml) and of the older MLX port, plus ours.
"""

import dataclasses
import difflib
import itertools
import math
import os
import re
import reprlib
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from methods import METHOD_KEYS, Method, find_method
from utils import UserError, read_file

REQUIRED = "(required)"
LARGEST = 10**9  # of whole numbers but the seed: products of a few of them fit into 64 bits
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, on Linux; macOS allows fewer in a path
# What a run saves; removed with all that is in it
CHECKPOINT = re.compile(r"^checkpoint_(\d+)(\.safetensors)?$")
STATE = re.compile(r"^state_(\d+)_(\d+)$")
NULL = "tag:yaml.org,2002:null"
PATH_KEYS = {  # `~` and environment variables are expanded in these
    "save_path", "model_id", "load_model_path", "model_config_path", "tokenizer", "train_path", "val_path",
    "token_cache",
}  # fmt: skip


def key(
    meaning: str,
    default=REQUIRED,
    at_least: float | None = None,
    at_most: float | None = None,
    words: tuple[str, ...] = (),
):
    """Declare a configuration key.

    words: texts that are allowed: for a key of type str no others, for other types in addition to values of the type.
    """
    limits = {"at_least": at_least, "at_most": at_most, "words": words}
    return field(default=default, metadata={"meaning": meaning, **limits})


@dataclass(frozen=True)
class Config:
    """All keys of a run. It is never changed after it was read; derived facts are properties."""

    # General
    save_path: str = key("directory that holds all runs")
    name: str = key("this run's directory inside save_path, and its name in wandb")
    project: str = key("project name in wandb", "coconut")
    wandb: str = key(
        "send metrics to wandb: `auto` does where it is installed and logged in; WANDB_MODE, where set, decides",
        "auto",
        words=("auto", "online", "offline", "off"),
    )
    only_eval: bool = key("load a model and evaluate it once on val_path; no training", False)
    debug: bool = key("first 5,000 training and 32 validation items, no wandb, no checkpoints", False)
    seed: int = key("seed of shuffling, dropout and fresh weights", 0, at_least=0, at_most=2**32 - 1)

    # Method: exactly one of the four is True
    coconut: bool = key("method: continuous thoughts", False)
    cot: bool = key("method: chain of thought in words", False)
    no_cot: bool = key("method: answer directly, all steps dropped", False)
    no_thoughts: bool = key("method: Coconut's curriculum without thoughts (c_thought is taken as 0)", False)

    thought: str = key(
        "what fills a latent place: the `hidden` state that is fed back, or a learned `pause` vector",
        "hidden",
        words=("hidden", "pause"),
    )

    # Curriculum
    curriculum: str = key(
        "how the written steps go away: one of the `steps` at each stage, single `tokens` from the left (iCoT), or all "
        "from the start (`none`)",
        "steps",
        words=("steps", "tokens", "none"),
    )
    tokens_per_epoch: float = key("curriculum `tokens`: tokens removed per epoch", 1, at_least=0, at_most=LARGEST)
    remove_all_from: int | None = key(
        "curriculum `tokens`: once so many tokens are due, the whole chain goes; where None, the longest chain decides",
        39,
        at_least=1,
    )
    removal_smoothing: float | None = key(
        "curriculum `tokens`: the rate of a random extra removal, P(o) ~ exp(-rate * o); None for no extra", 4, 1e-6
    )
    c_thought: int = key("continuous thoughts that replace one reasoning step", 1, at_least=0)
    epochs_per_stage: int = key("epochs of each training stage", 1, at_least=1)
    max_latent_stage: int = key("stages after the initial one; also the most steps replaced by thoughts", 0, at_least=0)
    pad_latent_to_max: bool = key(
        "give items with few steps as many thoughts as the others (evaluation, and training past max_latent_stage)",
        True,
    )
    layout: str = key(
        "how question, thoughts, steps and answer are joined: `lines` as officially, `compact` without newlines and "
        "without special tokens around the thoughts",
        "lines",
        words=("lines", "compact"),
    )
    uniform_prob: float = key("probability that a training item's stage is drawn uniformly instead", 0.0, 0, 1)

    # Model
    model_id: str | None = key("Hugging Face model id or local folder to start from, e.g. openai-community/gpt2", None)
    model_revision: str | None = key("revision (branch, tag or commit) of model_id on the Hub", None)
    load_model_path: str | None = key("checkpoint to start from or to evaluate (folder, .safetensors, .npz)", None)
    model_config_path: str | None = key(
        "GPT-2's config.json; with no weights named, a fresh model of that size and the vocabulary's rows", None
    )
    initializer_range: float | None = key("spread of fresh weights; where None, the model config's", None, at_least=0)
    embedding_range: float | None = key("spread of fresh token embeddings; where None, as initializer_range", None, 0)
    sinusoidal_positions: float | None = key(
        "amplitude of the sinusoids that fresh position embeddings start as; where None, they are drawn as weights are",
        None,
        at_least=0,
    )
    tokenizer: str | None = key("a .tiktoken file or a .json list of words; default GPT-2's vocabulary", None)
    lora_rank: int | None = key(
        "train adapters of this rank beside a frozen base (other models than GPT-2); None trains all weights", None, 1
    )
    lora_alpha: float = key("strength of the adapters: their output counts lora_alpha / lora_rank times", 16, 0)
    lora_dropout: float = key("dropout in front of the adapters", 0.0, at_least=0, at_most=0.99)
    lora_keys: str | None = key(
        "the layers of a block that get adapters, as `self_attn.q_proj, self_attn.v_proj`; None: all linear ones", None
    )
    quantize: int | None = key("bits of the frozen base beside adapters (QLoRA): 8 or 4; None leaves it as it is", None)
    bf16: bool = key("bfloat16 compute with float32 parameters (GPU only; on CPU float32 is used)", False)
    tf32: bool = key("TF32 products on a GPU: faster on CUDA and Apple's M5, off by 3e-4 instead of 1e-6", False)

    # Data
    train_path: str | None = key("training set (JSON list of question, steps, answer); needed unless only_eval", None)
    val_path: str = key("validation or test set, same format")
    drop_too_long: bool = key("leave out items longer than the model's positions, instead of stopping there", False)
    token_cache: str | None = key(
        "folder that keeps tokenized training sets; default coconut-mlx/tokens in $XDG_CACHE_HOME or ~/.cache", None
    )

    # Training
    num_epochs: int = key("epochs in all, the skipped ones of `resume` included", 1, at_least=1)
    resume: int = key(
        "epochs to skip at the start; with only_eval, the epoch whose stage is evaluated (by default the checkpoint's)",
        0,
        at_least=0,
    )
    batch_size_training: int = key("items per micro-batch, in each process", 32, at_least=1)
    gradient_accumulation_steps: int = key("micro-batches per optimizer step", 1, at_least=1)
    lr: float = key("learning rate of AdamW", 1e-4, at_least=0)
    weight_decay: float = key("weight decay of AdamW, on every parameter", 0.01, at_least=0)
    warmup_steps: int = key("optimizer steps over which the learning rate rises to lr (officially none)", 0, at_least=0)
    max_grad_norm: float | None = key("clip the gradient to this norm (officially not clipped)", None, at_least=0)
    grad_checkpoint: bool = key("compute activations again in the backward pass: less memory, more time", False)
    reset_optimizer: bool | str = key(
        "new optimizer every epoch (True, as the official code does), never (False), or at each `stage`",
        False,
        words=("stage",),
    )
    save_interval_minutes: float = key(
        "minutes between the saves inside an epoch from which a stopped run goes on", 10, 0
    )
    keep_checkpoints: int | str = key(
        "newest checkpoints to keep, or `all`; the best one is always kept", "all", at_least=1, words=("all",)
    )
    save_only_improve: bool = key("keep a checkpoint only when validation accuracy improves", False)

    # Evaluation
    batch_size_eval: int = key("items per batch in greedy decoding", 32, at_least=1)
    max_new_tokens: int | None = key(
        "longest answer in tokens; where None, 64 if val_path contains `gsm`, else 128", None, at_least=1
    )

    # No key: whether `resume` chooses the stage of an evaluation (see load_config), or is only the default
    resume_given: bool = field(default=True, compare=False)

    @property
    def method(self) -> Method:
        """The one method that is switched on."""
        chosen = next(name for name in METHOD_KEYS if getattr(self, name))
        method = find_method(chosen, self.thought, self.curriculum)
        assert method, "load_config refuses such a combination"
        return method

    @property
    def run_dir(self) -> Path:
        """The folder that this run writes into."""
        return Path(self.save_path) / self.name

    @property
    def answer_limit(self) -> int:
        """max_new_tokens; the default depends on the validation path's name (official run.py)."""
        return self.max_new_tokens or (64 if "gsm" in self.val_path else 128)

    def to_yaml(self) -> str:
        """The resolved configuration, every key included, in a form that loads again.

        But for `resume` of an evaluation that takes its stage from the checkpoint: given, it would decide next time.
        """
        left_out = {"resume"} if self.only_eval and not self.resume_given else set()
        keys = {name: value for name, value in self.to_dict().items() if name not in left_out}
        return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict:
        """Every key and its value."""
        return {name: getattr(self, name) for name in FIELDS}


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.metadata}
TYPES = typing.get_type_hints(Config)


def load_config(path: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check the whole.

    Precedence: override > file > default. Raises UserError that names every problem at once.
    """
    problems: list[str] = []
    in_file, changed = _read_yaml(path, problems), _read_overrides(overrides, problems)
    given = {**in_file, **changed}
    values = {}
    for name, value in given.items():
        if name not in FIELDS:
            problems.append(f"{name}: unknown key{_suggest(name)}")
            continue
        values[name] = _convert(name, value, problems)
    for name in FIELDS:
        if FIELDS[name].default is REQUIRED and name not in given:
            problems.append(f"{name}: missing; {FIELDS[name].metadata['meaning']}")
    _check_combinations(values, problems)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(f"{path}: {count} in the configuration\n" + "\n".join(f"  - {p}" for p in problems))
    # The `resume` of a training run's file, evaluated by `only_eval=True` on the command line, is about its training.
    evaluates = _as_type(in_file.get("only_eval"), bool)
    return Config(**values, resume_given="resume" in changed or ("resume" in in_file and bool(evaluates)))


def usage() -> str:
    """The text of --help: how to call run.py, and every key with type, default and meaning."""
    lines = [
        "usage: python run.py CONFIG [key=value ...] [--dry-run]",
        "",
        "Train and evaluate Coconut or one of its baselines as CONFIG (a YAML file, see args/) says.",
        "key=value overrides a key of the file, e.g. `python run.py args/gsm_cot.yaml save_path=runs lr=5e-5`.",
        "--dry-run checks configuration, data and weights, says what the run would do, and writes nothing.",
        "",
        "keys:",
    ]
    for name, f in FIELDS.items():
        default = "required" if f.default is REQUIRED else f"default {f.default}"
        lines += [f"  {name}  ({type_name(name)}, {default})", f"      {f.metadata['meaning']}"]
    return "\n".join(lines)


def _read_yaml(path: str, problems: list[str]) -> dict:
    try:
        loader = yaml.SafeLoader(read_file(Path(path)).decode("utf-8-sig"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = _describe(loader.construct_document(node) if node else None)
            raise UserError(f"{path}: expected `key: value` lines, found {found}")
        _note_repeated_keys(node, problems)
        values = {}
        for name, value in node.value:
            text = value.value if isinstance(value, yaml.ScalarNode) and value.tag != NULL else None
            values[name.value] = text if _keeps_text(name.value, text) else loader.construct_object(value, deep=True)
        return values
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start}); a YAML file is expected") from error
    except RecursionError as error:
        raise UserError(f"{path}: not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # `!!float "1x"` is a ValueError
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from error


def _note_repeated_keys(node: yaml.MappingNode, problems: list[str]) -> None:
    lines: dict[str, int] = {}
    for name, _ in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise ValueError(f"line {name.start_mark.line + 1}: expected the name of a key, found a list or a mapping")
        if name.value in lines:
            first, second = lines[name.value], name.start_mark.line + 1
            problems.append(f"{name.value}: given twice, in lines {first} and {second}; keep one")
        lines[name.value] = name.start_mark.line + 1


def _keeps_text(name: str, text: str | None) -> bool:
    """Whether a value is taken as it is written: that of a text key, and numbers that YAML 1.1 would read otherwise.

    YAML reads `1.10` as 1.1 and `off` as False, and 010 as 8 and 1:30 as 90.
    """
    if text is None or name not in FIELDS:
        return False
    allowed = set(typing.get_args(TYPES[name]) or (TYPES[name],)) - {type(None)}
    return allowed == {str} or bool(allowed & {int, float} and re.fullmatch(r"[+-]?0\d+|\d+(:\d+)+", text))


def _read_overrides(overrides: typing.Sequence[str], problems: list[str]) -> dict:
    values = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r} on the command line: expected key=value")
            continue
        try:
            values[name] = value if _keeps_text(name, value) else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            values[name] = value
    return values


def _convert(name: str, value, problems: list[str]):
    """The value in the key's type; a problem is noted where it has no such reading."""
    if isinstance(value, str) and value.strip() in ("None", "null", ""):
        value = None  # the official files write None as a word
    allowed = typing.get_args(TYPES[name]) or (TYPES[name],)
    if value is None:
        if type(None) not in allowed:
            problems.append(f"{name}: expected {type_name(name)}, found nothing (None)")
        return None
    words = FIELDS[name].metadata["words"]
    if value in words:
        return value
    if words:
        allowed = [wanted for wanted in allowed if wanted is not str]
    for wanted in allowed:
        converted = _as_type(value, wanted)
        if converted is not None:
            if name in PATH_KEYS or name == "name":
                converted = _as_path(name, converted, problems)
            _check_range(name, converted, problems)
            return converted
    problems.append(f"{name}: expected {type_name(name)}, found {_describe(value)}")
    return None


def _as_path(name: str, value: str, problems: list[str]) -> str:
    """The value with `~` and variables expanded; a problem is noted where no file can have such a name."""
    try:
        if "\0" in value:
            raise ValueError("a null character")
        path = os.path.expandvars(os.path.expanduser(value)) if name in PATH_KEYS else value
        if name in PATH_KEYS and path.startswith(("~", "$")):  # left as it is, it would become a folder of that name
            raise ValueError(f"a user or variable that is not there: {path}")
        if len(os.fsencode(path)) > LONGEST_PATH or max(map(len, os.fsencode(path).split(b"/"))) > LONGEST_NAME:
            raise ValueError(f"one of {len(path):,} characters")
        return path
    except ValueError as error:  # fsencode's: half a character
        problems.append(f"{name}: expected a path, found {_one_line(error)}")
        return value


def _as_type(value, wanted: type):
    """`value` as `wanted`, or None where it is not one."""
    if wanted is bool and isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool) or wanted is bool:
        return value if isinstance(value, bool) and wanted is bool else None
    if wanted is str and isinstance(value, (str, int, float)):
        return str(value)
    if wanted is float:
        return _as_float(value)
    if wanted is int:
        number = _as_float(value)
        return int(number) if number is not None and number.is_integer() else None
    return None


def _as_float(value) -> float | None:
    """PyYAML reads `1e-4` as a string, because YAML 1.1 wants a dot: such strings are numbers here."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_range(name: str, value, problems: list[str]) -> None:
    at_least, at_most = FIELDS[name].metadata["at_least"], FIELDS[name].metadata["at_most"]
    if isinstance(value, (bool, str)):
        return
    if at_least is not None and value < at_least:
        problems.append(f"{name}: expected at least {at_least}, found {value}")
    if at_most is None and isinstance(value, int):
        at_most = LARGEST
    if at_most is not None and value > at_most:
        problems.append(f"{name}: expected at most {at_most}, found {value}")


def _check_combinations(values: dict, problems: list[str]) -> None:
    for name, value in values.items():
        if isinstance(value, str) and value.startswith(("YOUR_PATH", "PATH_TO")):
            problems.append(f"{name}: still the placeholder {value!r}; put your own path there")
    name = values.get("name") or "run"
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] in (".", ".."):
        problems.append(f"name: expected a folder inside save_path, found {name!r}; save_path says where that is")
    if any(CHECKPOINT.match(part) or STATE.match(part) for part in name.split(os.sep)):
        problems.append(f"name: expected another one, found {name!r}; a run calls its saved folders so")
    _check_method(values, problems)
    _check_adapters(values, problems)
    if values.get("only_eval"):
        if not (values.get("load_model_path") or values.get("model_id")):
            problems.append("only_eval: nothing to evaluate; name a checkpoint with load_model_path")
    elif values.get("train_path") is None:
        problems.append("train_path: missing; needed unless only_eval is True")
    if not any(values.get(name) for name in ("model_id", "load_model_path", "model_config_path")):
        problems.append("model: name model_id, load_model_path or model_config_path")
    loaded = next((name for name in ("model_id", "load_model_path") if values.get(name)), None)
    for name in ("embedding_range", "sinusoidal_positions"):
        if loaded and values.get(name) is not None:
            problems.append(f"{name}: has no effect, because it is about fresh weights and {loaded} names weights")
    if values.get("max_grad_norm") == 0:
        problems.append("max_grad_norm: 0 would train nothing; None switches clipping off")
    if values.get("lr") == 0:
        problems.append("lr: 0 would train nothing; for an evaluation set only_eval")
    resume, epochs = values.get("resume") or 0, values.get("num_epochs") or 1
    if resume >= epochs and not values.get("only_eval"):
        problems.append(f"resume: {resume} leaves nothing to train, because num_epochs is {epochs}")


def _check_adapters(values: dict, problems: list[str]) -> None:
    if values.get("quantize") not in (None, 4, 8):
        problems.append(f"quantize: expected 8, 4 or None, found {values['quantize']}")
    given = [name for name in ("lora_keys", "quantize", "lora_dropout") if values.get(name)]
    if given and not values.get("lora_rank") and not values.get("only_eval"):
        problems.append(f"{', '.join(given)}: no effect without lora_rank")


def _check_method(values: dict, problems: list[str]) -> None:
    chosen = [name for name in METHOD_KEYS if values.get(name)]
    if len(chosen) != 1:
        found = " and ".join(chosen) if chosen else "none"
        problems.append(f"method: expected exactly one of {', '.join(METHOD_KEYS)} to be True, found {found}")
        return
    thought, curriculum = (values.get(name, FIELDS[name].default) for name in ("thought", "curriculum"))
    words = {name: FIELDS[name].metadata["words"] for name in ("thought", "curriculum")}
    if thought not in words["thought"] or curriculum not in words["curriculum"]:
        return  # noted as a problem of that key already
    if curriculum != "steps" and values.get("uniform_prob"):
        problems.append(f"uniform_prob: draws stages, and curriculum `{curriculum}` has none")
    for name in ("tokens_per_epoch", "remove_all_from", "removal_smoothing"):
        if curriculum != "tokens" and values.get(name, FIELDS[name].default) != FIELDS[name].default:
            problems.append(f"{name}: has no effect without curriculum `tokens`")
    if curriculum == "tokens" and values.get("tokens_per_epoch") == 0:
        problems.append("tokens_per_epoch: expected more than 0")
    if not find_method(chosen[0], thought, curriculum):
        known = [pair for pair in itertools.product(*words.values()) if find_method(chosen[0], *pair)]
        listed = "; ".join(f"`{thought}` with `{curriculum}`" for thought, curriculum in known)
        problems.append(
            f"thought, curriculum: no method is {chosen[0]} with thought `{thought}` and curriculum `{curriculum}`; "
            f"there is {listed}"
        )


def _suggest(name: str) -> str:
    close = difflib.get_close_matches(str(name), FIELDS, n=1)
    return f"; did you mean {close[0]}?" if close else "; `python run.py --help` lists the keys"


def type_name(name: str) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text", type(None): "None"}
    allowed = typing.get_args(TYPES[name]) or (TYPES[name],)
    words = FIELDS[name].metadata["words"]
    return " or ".join([names[t] for t in allowed if not (words and t is str)] + [f"`{word}`" for word in words])


def _describe(value) -> str:
    if value is None:
        return "nothing (None)"
    short = reprlib.Repr()
    short.maxstring, short.maxlevel = 200, 2  # YAML's anchors can make a list of billions of elements
    return f"{short.repr(value)} ({type(value).__name__})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
