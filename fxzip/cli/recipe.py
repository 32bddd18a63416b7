"""Recipes: what to merge and how, in a YAML file. Every problem of one is reported at once, with its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..errors import InputError
from ..memory import wrong_memory
from ..options import wrong_options
from . import data as datas
from . import models
from .spec import inside, moved
from .yaml_lines import dumped, lines_of, parsed

LIMIT = 1 << 18  # bytes
HEAD = "# fxzip merge recipe.yaml OUT makes this folder again. Paths are relative to this file.\n"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(_Strict):
    """source: see `data.HOW`; the rest says how images become inputs, and how many samples run at once."""

    source: str
    image_size: int | None = Field(None, ge=1)
    mean: list[float] = Field(list(datas.MEAN), min_length=1)
    std: list[float] = Field(list(datas.STD), min_length=1)
    batch_size: int = Field(64, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    def samples(self, folder: Path, seed: int) -> datas.Samples:
        return datas.samples(self.source, datas.Images(self.image_size, self.mean, self.std), folder, seed)


class Model(_Strict):
    """One of the networks. model: default the recipe's; weights: a checkpoint; classes: of the data set, one per
    output, for `fxzip eval`; data: its own calibration data; sha256: of the weights, checked if given."""

    name: str | None = Field(None, pattern=r"^[^\s/\\][^/\\]*$")
    model: str | None = None
    weights: str | None = None
    data: Data | None = None
    classes: list[int | str] | None = None
    sha256: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"weights": value} if isinstance(value, str) else value


class Recipe(_Strict):
    """The keys of a recipe; those of `fxzip.merge` mean what they mean there."""

    model: str | None = None
    models: list[Model] = Field(min_length=2)
    method: str = "solve"
    parameters: dict[str, Any] = {}
    until: str | None = None
    since: str | None = None
    budget: float | dict[str, int] | None = None
    round_to: int = Field(8, ge=1)
    heads: Literal["separate", "concat", "joint", "average"] = "separate"
    model_weights: list[Annotated[float, Field(gt=0)]] | None = None
    data: Data | None = None
    calibration: int = Field(2048, ge=1)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    strict: bool = False
    verify: Literal[True, False, "report"] = True
    memory: int | str | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, given: Any) -> Any:
        """In the words of `merge`: of a union pydantic says what is wrong with every part."""
        for problem in wrong_options({"budget": given}):
            raise PydanticCustomError("budget", "{problem}", {"problem": problem})
        return given

    @field_validator("memory")
    @classmethod
    def _memory(cls, given: int | str | None) -> int | str | None:
        if problem := wrong_memory(given):
            raise PydanticCustomError("memory", "{problem}", {"problem": problem})
        return given

    @field_validator("models")
    @classmethod
    def _names(cls, given: list[Model]) -> list[Model]:
        names = [m.name for m in given if m.name]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise PydanticCustomError("names", "two models are called '{name}'", {"name": twice})
        if names and len(names) < len(given):
            raise PydanticCustomError("names", "give every model a name, or none")
        return given

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the models, as fxzip.merge gives them."""
        return tuple(m.name or f"task{i}" for i, m in enumerate(self.models))


@dataclass(frozen=True)
class Read:
    """A recipe and the folder that its paths start from."""

    recipe: Recipe
    folder: Path

    def text_for(self, out: Path, hashes: Mapping[str, str]) -> str:
        """The recipe in full, as it will lie in `out`, with the hashes of the weights."""

        def change(path: Path) -> str:
            return moved(path, out)

        raw = self.recipe.model_dump(mode="json", exclude_none=True)
        for entry in (raw, *raw["models"]):
            if "model" in entry:
                entry["model"] = models.relative(entry["model"], change, self.folder)
            if "data" in entry:
                entry["data"]["source"] = datas.relative(entry["data"]["source"], change, self.folder)
        for entry in raw["models"]:
            if "weights" in entry:
                entry["sha256"] = hashes[entry["weights"]]
                entry["weights"] = change(inside(entry["weights"], self.folder))
        return HEAD + dumped(raw)


def read(path: Path, files: bool = True) -> Read:
    """Parse and check a recipe file. Raises InputError that lists every problem, with line numbers.

    files=False: whether the weights are there is another's affair."""
    try:
        size = path.stat().st_size
        if size > LIMIT:
            raise InputError(f"{path}: {size:,} bytes; a recipe has at most {LIMIT:,}")
        text = path.read_text(encoding="utf-8")
        node = parsed(text)
        raw = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise InputError(f"no recipe {str(path)!r}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: must hold keys such as models, method, data; it holds {type(raw).__name__}")
    return check(raw, path.parent, str(path), dict(lines_of(node)), files)


def check(
    raw: Mapping[str, Any], folder: Path, what: str, lines: Mapping[tuple, int] | None = None, files: bool = True
) -> Read:
    """A recipe from plain values. Raises InputError that lists every problem; lines: place -> line."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        found = [_said(e, lines or {}) for e in error.errors()]
        raise InputError.listing(what, list(dict.fromkeys(found))) from error
    found = list(_missing(recipe, folder, files))
    if found:
        raise InputError.listing(what, found)
    return Read(recipe, folder)


def method_of(recipe: Recipe) -> Any:
    """What to pass as method=: the name, or with parameters the object it stands for. Raises InputError."""
    from ..distill import Distill
    from ..match import MATCHERS, resolve
    from ..repair import MODIFIERS, Repair, split
    from ..solve import Settings, Solve

    if not recipe.parameters:
        repaired, plain = split(recipe.method)
        if not repaired and plain != "solve" and not isinstance(plain, Distill):
            resolve(plain, [Solve.name])
        return recipe.method
    given, (name, _, modifier) = dict(recipe.parameters), recipe.method.partition("+")
    if isinstance(given.get("matcher"), str):
        given["matcher"] = resolve(given["matcher"])
    kinds = {m.name: m for m in MATCHERS}
    if name == "solve":
        split(recipe.method)
        steps = ["epochs", "batch", "features", "precision", "solve_samples", "rate", "damping"] if modifier else []
        _known(given, ["matcher", *(f.name for f in fields(Settings)), *steps], recipe.method)
        further = {k: given.pop(k) for k in steps if k in given}
        solve = Solve(given.pop("matcher", None), _made(Settings, given))
        return _made(Distill, {"solve": solve, **further}) if modifier else solve
    if name not in kinds:
        resolve(name, [Solve.name])
    if modifier and modifier not in MODIFIERS:
        split(recipe.method)
    _known(given, [f.name for f in fields(kinds[name])], recipe.method)  # type: ignore[arg-type]
    matcher = _made(kinds[name], given)
    return Repair(matcher, MODIFIERS[modifier]) if modifier else matcher


def absent(recipe: Recipe, folder: Path) -> dict[int, str]:
    """Model -> what is wrong with its weights: there is no such file."""
    paths = {i: inside(m.weights, folder) for i, m in enumerate(recipe.models) if m.weights}
    return {i: f"models[{i}].weights: no file {str(p)!r}" for i, p in paths.items() if not p.is_file()}


def _missing(recipe: Recipe, folder: Path, files: bool) -> Iterator[str]:
    """What a schema cannot see: files, and what belongs together."""
    for i, model in enumerate(recipe.models):
        if not (model.model or recipe.model):
            yield f"models[{i}]: no model; {models.HOW}"
    yield from absent(recipe, folder).values() if files else ()
    own = [m.data is not None for m in recipe.models]
    if any(own) and not all(own):
        yield "data: give every model its own, or one for all of them at the top"
    if any(own) and recipe.data:
        yield "data: given at the top and per model; keep one"
    try:
        method_of(recipe)
    except (InputError, TypeError) as error:
        yield f"method: {error}"


def _known(given: Mapping[str, Any], names: list[str], method: str) -> None:
    for name in given:
        if name not in names:
            close = get_close_matches(name, names, 1, 0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names) or 'none'}"
            raise InputError(f"method {method!r} has no parameter {name!r}: {hint}")


def _made(kind: Any, given: Mapping[str, Any]) -> Any:
    for f in fields(kind):
        default = f.default
        if f.name in given and isinstance(default, (bool, int, float, str)):
            value = given[f.name]
            fits = isinstance(value, (int, float)) if isinstance(default, float) else isinstance(value, type(default))
            if not fits or (isinstance(value, bool) and not isinstance(default, bool)):
                raise InputError(f"parameter {f.name} must be a {type(default).__name__}, not {value!r}")
    return kind(**given)


def _said(error: Any, lines: Mapping[tuple, int]) -> str:
    """One of pydantic's errors in our words."""
    place = tuple(error["loc"])
    shown = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    line = f"line {lines[place]}: " if place in lines else ""
    if error["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        close = get_close_matches(str(place[-1]), known, 1, 0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"keys: {', '.join(known)}"
        return f"{line}unknown key {shown}: {hint}"
    if error["type"] == "missing":
        return f"{shown} is missing"
    if error["type"] in ("names", "memory", "budget"):
        return f"{line}{error['msg']}"
    return f"{line}{shown}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _keys_at(place: tuple) -> list[str]:
    kind = Data if place[-1:] == ("data",) else Model if place[:1] == ("models",) else Recipe
    return list(kind.model_fields)
