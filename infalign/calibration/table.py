"""The cached table: samples of one model on many prompts, and their rewards, on disk as Parquet shards.

    plan.json                          the sampling settings, and segments of work in the order they were asked for
    segment-000/prompts.parquet        key, content and token ids of the segment's prompts
    segment-000/00007.parquet          the samples of its batch 7
    scores-<fingerprint>/000-00007-0.parquet their rewards by one reward, and which columns of the data it read

A shard is written whole or not at all and a segment's batches follow from the plan alone, so a killed run continues
where it stopped and ends with the table it would have had. More prompts or a larger K make a new segment of what is
missing; another reward, or other values in the columns that it reads, makes new scores and no samples. The table never
forgets: what it holds is what was drawn.

Tables of infalign 0.1.0 knew a prompt by its normalised text (`types.group_key`). They are read as they are: their plan
has no `identity`, and their prompts get the keys of their exact content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infalign.runtime.artifacts import differences, read_json, sweep_temporaries, write_json, write_whole
from infalign.types import TEMPLATE_COLUMNS, InputError, Prompt, Sample, prompt_key, row_keys

IDENTITY = 2
"""How plans name prompts: 2 is `types.prompt_key`; plans without it are of version 1, `types.group_key`."""

REFERENCES: dict[str, Callable[[Sample], Any]] = {
    "ref_completion_ids": lambda sample: list(sample.token_ids),
    "ref_logps": lambda sample: float(sample.token_logps.sum(dtype=np.float64)),
}
"""The columns that the offline solver reads beside the rewards, and what stands there of each base sample."""

_SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("index", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_logps", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("finished", pa.bool_()),
    ]
)
_SCORES = pa.schema([("key", pa.string()), ("index", pa.int32()), ("reward", pa.float64()), ("columns", pa.string())])
_PROMPTS = pa.schema([("key", pa.string()), ("content", pa.string()), ("prompt_ids", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class Wanted:
    """`count` samples of a prompt, whose tokens as the model sees them are `prompt_ids`."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Segment:
    """One request for samples: (key, first index, end index) for each prompt, and the budget that cuts its batches."""

    number: int
    rows: tuple[tuple[str, int, int], ...]
    tokens_per_batch: int


@dataclass
class SampleTable:
    """The samples in one folder. Open one with `SampleTable.open`.

    Attributes:
        folder: where it lives.
        parts: everything that shapes the sampling distribution (model, template, temperature, seed, ...).
        segments: what has been asked for so far, with the keys that samples are stored under.
        names: stored key -> the prompt's key, for prompts that are stored under an older one.
    """

    folder: Path
    parts: dict[str, Any]
    segments: list[Segment] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, parts: Mapping[str, Any]) -> SampleTable:
        """The table in `folder`, or a new one.

        Raises:
            InputError: the folder holds samples of another model, template or sampling setting, which are named.
        """
        path = folder / "plan.json"
        table = cls(folder, json.loads(json.dumps(dict(parts), default=str)))
        if not path.exists():
            return table
        plan = read_json(path, "the sampling plan")
        found = differences(plan["parts"], table.parts)
        if found:
            raise InputError(
                f"{folder} holds samples drawn with other settings ({'; '.join(found)}): "
                "use another output_dir, or --overwrite to draw them anew"
            )
        table.segments = [
            Segment(
                number, tuple((key, first, end) for key, first, end in segment["rows"]), segment["tokens_per_batch"]
            )
            for number, segment in enumerate(plan["segments"])
        ]
        for number in plan.get("older", [] if "identity" in plan else range(len(table.segments))):
            prompts = _read(table._segment_folder(table.segments[number]) / "prompts.parquet")
            for stored, content in zip(prompts["key"].to_pylist(), prompts["content"].to_pylist(), strict=True):
                table.names[stored] = prompt_key(json.loads(content))
        return table

    def request(self, wanted: Sequence[Wanted], tokens_per_batch: int) -> int:
        """Plan whatever of `wanted` was never planned, as a new segment; returns how many samples that adds.

        Raises:
            InputError: a prompt whose tokens differ from those its samples were drawn on.
        """
        # a prompt's later segments go on where the earlier ones end, so the last end is its count
        held = {self.key_of(key): end for segment in self.segments for key, _, end in segment.rows}
        self._check_tokens(wanted)
        missing = [entry for entry in wanted if held.get(entry.prompt.key, 0) < entry.count]
        if not missing:
            return 0
        rows = tuple((entry.prompt.key, held.get(entry.prompt.key, 0), entry.count) for entry in missing)
        segment = Segment(len(self.segments), rows, tokens_per_batch)
        self._write_prompts(segment, missing)
        self.segments.append(segment)
        plan = [{"rows": list(entry.rows), "tokens_per_batch": entry.tokens_per_batch} for entry in self.segments]
        older = [one.number for one in self.segments if any(key in self.names for key, _, _ in one.rows)]
        content = {"identity": IDENTITY, "older": older, "parts": self.parts, "segments": plan}
        write_json(self.folder / "plan.json", content)
        return sum(end - first for _, first, end in rows)

    def key_of(self, stored: str) -> str:
        """The key of the prompt whose samples are stored under `stored`."""
        return self.names.get(stored, stored)

    def stored_prompt_ids(self) -> dict[str, tuple[int, ...]]:
        """The tokens of every planned prompt, by the key that its samples are stored under."""
        found: dict[str, tuple[int, ...]] = {}
        for segment in self.segments:
            table = _read(self._segment_folder(segment) / "prompts.parquet")
            found |= {
                key: tuple(ids)
                for key, ids in zip(table["key"].to_pylist(), table["prompt_ids"].to_pylist(), strict=True)
            }
        return found

    def shard(self, segment: Segment, batch: int) -> Path:
        """Where the samples of a batch are or will be."""
        return self._segment_folder(segment) / f"{batch:05d}.parquet"

    def new_score_shard(self, segment: Segment, batch: int, reward: str) -> Path:
        """Where further rewards of a batch by the reward of that fingerprint go."""
        folder = self.scores_folder(reward)
        taken = len(list(folder.glob(f"{segment.number:03d}-{batch:05d}-*.parquet")))
        return folder / f"{segment.number:03d}-{batch:05d}-{taken}.parquet"

    def scores_folder(self, reward: str) -> Path:
        """Where the rewards by the reward of that fingerprint are."""
        return self.folder / f"scores-{reward}"

    def scored(self, reward: str, columns: Mapping[str, str]) -> set[tuple[str, int]]:
        """(key, index) of every sample that the reward of that fingerprint has been asked about.

        Args:
            reward: its fingerprint.
            columns: by prompt key, the digest of the columns that it reads (`rewards.scoring.columns_digest`); scores
                on other values don't count, scores of infalign 0.1.0, which noted none, do.
        """
        rows = self._scores(reward, columns)
        return {(key, index) for key, found in rows.items() for index in found}

    def sweep(self) -> None:
        """Remove what killed writers left behind."""
        for folder in (self.folder, *self.folder.glob("s*-*/")):
            sweep_temporaries(folder)

    def samples(self) -> dict[str, list[Sample]]:
        """Every sample on disk, by prompt key, in index order."""
        found: dict[str, list[Sample]] = {}
        for segment in self.segments:
            for path in sorted(self._segment_folder(segment).glob("[0-9]*.parquet")):
                for sample in read_samples(path):
                    key = self.key_of(sample.key)
                    found.setdefault(key, []).append(replace(sample, key=key))
        return {key: sorted(rows, key=lambda sample: sample.index) for key, rows in found.items()}

    def rewards(self, reward: str, columns: Mapping[str, str] | None = None) -> dict[str, NDArray[np.float64]]:
        """The rewards by the reward of that fingerprint, by prompt key, in index order; NaN is "no score".

        `columns` as for `scored`; None takes the latest scores, whatever columns they were made with.
        """
        found = self._scores(reward, columns)
        return {key: np.array([value for _, value in sorted(rows.items())]) for key, rows in found.items()}

    def _scores(self, reward: str, columns: Mapping[str, str] | None) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        paths = self.scores_folder(reward).glob("[0-9]*.parquet")
        for path in sorted(paths, key=lambda path: [int(part) for part in path.stem.split("-")]):
            table = _read(path)
            read = table["columns"].to_pylist() if "columns" in table.column_names else [None] * len(table)
            rows = zip(*(table[name].to_pylist() for name in ("key", "index", "reward")), read, strict=True)
            for stored, index, value, digest in rows:
                key = self.key_of(stored)
                if columns is None or digest is None or columns.get(key) in (None, digest):
                    found.setdefault(key, {})[index] = value
        return found

    def attach(
        self,
        dataset: Any,
        reward: str,
        *,
        count: int | None = None,
        column: str = "ref_rewards",
        samples: bool = False,
    ) -> Any:
        """A data set with each prompt's reference rewards as a further column, for `CTRLReward`.

        Args:
            dataset: a `datasets.Dataset` with a column `prompt`.
            reward: the reward's fingerprint.
            count: K, the first so many samples; None takes all that the table has.
            column: the new column's name.
            samples: also attach the scored samples themselves, for the offline solver: `ref_completion_ids`, their
                tokens, and `ref_logps`, their log-probabilities, summed over tokens, nats.

        Rows of equal content get the samples of the table's rows of that content, in order.

        Raises:
            InputError: prompts that were never calibrated, or without a single score; the first one is shown. Or
                samples that were scored with several values of the columns that the reward reads.
        """
        self._check_one_score_each(reward)
        given = {key: row[:count] for key, row in self.rewards(reward).items()}
        further = [
            dataset[name] if name in dataset.column_names else [None] * len(dataset) for name in TEMPLATE_COLUMNS
        ]
        keys = list(
            row_keys(
                (prompt, dict(zip(TEMPLATE_COLUMNS, values, strict=True)))
                for prompt, *values in zip(dataset["prompt"], *further, strict=True)
            )
        )
        nothing = np.empty(0)
        rows = [row[~np.isnan(row)] for row in (given.get(key, nothing) for key in keys)]
        absent = [prompt for prompt, row in zip(dataset["prompt"], rows, strict=True) if not row.size]
        if absent:
            raise InputError(
                f"{len(absent)} of {len(rows)} prompts have no reference reward (first: {str(absent[0])[:80]!r}): "
                "run `infalign calibrate` on these prompts"
            )
        dataset = dataset.add_column(column, [row.tolist() for row in rows])
        if not samples:
            return dataset
        held = self.samples()
        kept = [[one for one, value in zip(held[key], given[key], strict=False) if not np.isnan(value)] for key in keys]
        for name, of in REFERENCES.items():
            dataset = dataset.add_column(name, [[of(sample) for sample in row] for row in kept])
        return dataset

    def _check_one_score_each(self, reward: str) -> None:
        seen: dict[tuple[str, int], str | None] = {}
        for path in self.scores_folder(reward).glob("[0-9]*.parquet"):
            table = _read(path)
            columns = table["columns"].to_pylist() if "columns" in table.column_names else [None] * len(table)
            for key, index, digest in zip(table["key"].to_pylist(), table["index"].to_pylist(), columns, strict=True):
                if seen.setdefault((key, index), digest) != digest:
                    raise InputError(
                        f"{self.folder}: samples were scored with several values of the columns that the reward reads: "
                        "train with the recipe, which picks those of the data, or run calibrate --overwrite first"
                    )

    def _check_tokens(self, wanted: Sequence[Wanted]) -> None:
        held = {self.key_of(key): ids for key, ids in self.stored_prompt_ids().items()}
        changed = [e.prompt.key for e in wanted if e.prompt.key in held and held[e.prompt.key] != e.prompt_ids]
        if changed:
            raise InputError(
                f"{self.folder}: {len(changed)} prompts are rendered to other tokens than their samples were drawn on "
                f"(first: {changed[0]}): the chat template changed; use another output_dir, or --overwrite"
            )

    def _write_prompts(self, segment: Segment, missing: Sequence[Wanted]) -> None:
        rows = [
            {
                "key": entry.prompt.key,
                "content": json.dumps(entry.prompt.content, ensure_ascii=False),
                "prompt_ids": entry.prompt_ids,
            }
            for entry in missing
        ]
        table = pa.Table.from_pylist(rows, schema=_PROMPTS)
        write_whole(self._segment_folder(segment) / "prompts.parquet", lambda path: pq.write_table(table, path))

    def _segment_folder(self, segment: Segment) -> Path:
        return self.folder / f"segment-{segment.number:03d}"


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples as one Parquet shard, whole or not at all."""
    rows = [{name: getattr(sample, name) for name in _SAMPLES.names} for sample in samples]
    table = pa.Table.from_pylist(rows, schema=_SAMPLES)
    write_whole(path, lambda temporary: pq.write_table(table, temporary))


def read_samples(path: Path) -> list[Sample]:
    """The samples of one shard.

    Raises:
        InputError: the file is not a whole shard.
    """
    return [
        Sample(
            key=row["key"],
            index=row["index"],
            token_ids=tuple(row["token_ids"]),
            token_logps=np.array(row["token_logps"], dtype=np.float32),
            text=row["text"],
            finished=row["finished"],
        )
        for row in _read(path).to_pylist()
    ]


def write_scores(
    path: Path, samples: Sequence[Sample], rewards_B: NDArray[np.float64], columns_B: Sequence[str]
) -> None:
    """Write the rewards of samples as one Parquet shard; NaN is kept as NaN, never as a number.

    `columns_B` are digests of the columns that the reward could read, see `SampleTable.scored`.
    """
    rows = [
        {"key": sample.key, "index": sample.index, "reward": float(value), "columns": columns}
        for sample, value, columns in zip(samples, rewards_B, columns_B, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=_SCORES)
    write_whole(path, lambda temporary: pq.write_table(table, temporary))


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a whole Parquet file ({error}): delete it and run again") from error
