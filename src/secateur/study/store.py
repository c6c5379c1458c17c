"""The store: one row per finished trial, in SQLite or PostgreSQL, and the curves of their trainings."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from secateur.errors import ArtifactError, InputError
from secateur.report.records import Failure, Record
from secateur.study.results import Point, Result

SCHEMA = 1
BUSY_SECONDS = 60  # how long to wait for another process that writes to the same SQLite file
_MAKING = 0x5EC47E  # the lock under which PostgreSQL makes the tables: any number that others do not use
_ABSENT = "there is no store {}: run the study first, or pass its --store."

_tables = sa.MetaData()
_meta = sa.Table(
    "secateur_meta", _tables, sa.Column("name", sa.String(40), primary_key=True), sa.Column("value", sa.String(200))
)
_trials = sa.Table(
    "secateur_trials",
    _tables,
    sa.Column("study", sa.String(120), primary_key=True),
    sa.Column("key", sa.String(240), primary_key=True),
    sa.Column("finished", sa.String(40), nullable=False),  # UTC, ISO 8601
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("record", sa.Text),  # JSON; null where the trial failed
    sa.Column("error", sa.Text),
)
_curves = sa.Table(
    "secateur_curves",
    _tables,
    sa.Column("study", sa.String(120), primary_key=True),
    sa.Column("key", sa.String(240), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),  # from 0, in order of training
    sa.Column("stage", sa.String(40), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("loss", sa.Float, nullable=False),
    sa.Column("accuracy", sa.Float, nullable=False),
    sa.Column("lr", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class Row:
    """A finished trial as it is stored."""

    key: str
    finished: str
    seconds: float
    record: Record | None
    error: str | None


class Store:
    """Finished trials by (study, key). Every method is one transaction, so several processes may use it at once."""

    def __init__(self, url: str, *, create: bool = True) -> None:
        """Open a store; where there is none yet, make it, or with `create=False` raise ArtifactError.

        `url`: `sqlite:///file.db`, `postgresql://user:password@host/database`, or a plain path of a SQLite file. Raises
        InputError for a URL that cannot be used, ArtifactError for a store of another version or that is no store.
        """
        self.url = _as_url(url)
        file = self.url.database
        if self.url.drivername.startswith("sqlite") and file and not file.startswith("file:"):  # a URI of SQLite's own
            if not create and not Path(file).exists():
                raise ArtifactError(_ABSENT.format(file))
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._engine = sa.create_engine(self.url, **_options(self.url))
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            raise InputError(f"{self}: {error}. Supported: sqlite, and postgresql with secateur[study].") from error
        self._prepare(create)

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    def done(self, study: str) -> set[str]:
        """The keys of all finished trials, failed ones among them."""
        with self._connected() as link:
            return set(link.scalars(sa.select(_trials.c.key).where(_trials.c.study == study)))

    def add(self, study: str, result: Result) -> bool:
        """Store a finished trial; False, and nothing changes, where it is there already."""
        record = result.record
        return self._insert(study, record.key, record.seconds, record.to_json(), None, result.curve)

    def add_failure(self, study: str, failure: Failure, seconds: float = 0.0) -> bool:
        """Store that a trial failed; False where it is there already."""
        text = failure.error.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")  # what databases take
        return self._insert(study, failure.key, seconds, None, text, ())

    def forget_failures(self, study: str) -> int:
        """Remove the failed trials, so that they are missing again; how many there were."""
        with self._connected() as link:
            gone = sa.delete(_trials).where(_trials.c.study == study, _trials.c.error.is_not(None))
            return link.execute(gone).rowcount

    def rows(self, study: str, keys: Collection[str] | None = None) -> list[Row]:
        """Finished trials in the order in which they finished; only those of `keys`, where given."""
        query = sa.select(_trials).where(_trials.c.study == study).order_by(_trials.c.finished, _trials.c.key)
        with self._connected() as link:
            found = link.execute(query).mappings().all()
        return [_row(raw) for raw in found if keys is None or raw["key"] in keys]

    def curves(self, study: str, keys: Collection[str] | None = None) -> dict[str, list[Point]]:
        """The epochs of every training, by trial."""
        query = sa.select(_curves).where(_curves.c.study == study).order_by(_curves.c.key, _curves.c.number)
        curves: dict[str, list[Point]] = {}
        with self._connected() as link:
            for raw in link.execute(query).mappings():
                if keys is None or raw["key"] in keys:
                    curves.setdefault(raw["key"], []).append(Point(*(raw[name] for name in Point._fields)))
        return curves

    def studies(self) -> dict[str, int]:
        """The names of all studies in it, and how many trials each has."""
        query = sa.select(_trials.c.study, sa.func.count()).group_by(_trials.c.study).order_by(_trials.c.study)
        with self._connected() as link:
            return {row[0]: row[1] for row in link.execute(query)}

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _insert(
        self, study: str, key: str, seconds: float, record: str | None, error: str | None, curve: Sequence[Point]
    ) -> bool:
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        values = {"study": study, "key": key, "finished": now, "seconds": seconds, "record": record, "error": error}
        new = self._kind.insert(_trials).values(values).on_conflict_do_nothing().returning(_trials.c.key)
        with self._connected() as link:
            if link.scalar(new) is None:
                return False
            points = [{"study": study, "key": key, "number": n, **p._asdict()} for n, p in enumerate(curve)]
            if points:
                link.execute(sa.insert(_curves), points)
            return True

    @property
    def _kind(self) -> ModuleType:
        """The statements that only this database has."""
        return postgresql if self._engine.dialect.name == "postgresql" else sqlite

    def _prepare(self, create: bool) -> None:
        with self._connected() as link:
            if self._is_there(link):
                return
        if not create:
            raise ArtifactError(_ABSENT.format(self))
        alone = "BEGIN IMMEDIATE" if self._kind is sqlite else f"SELECT pg_advisory_xact_lock({_MAKING})"
        with self._connected() as link:
            link.exec_driver_sql(alone)  # of several processes that find no store, one makes it
            if not self._is_there(link):
                _tables.create_all(link)
                link.execute(sa.insert(_meta).values(name="schema", value=str(SCHEMA)))

    def _is_there(self, link: sa.Connection) -> bool:
        """Whether there is a store. Raises ArtifactError where there is one of another schema, or something else."""
        existing = sa.inspect(link).get_table_names()
        if _meta.name in existing:
            version = link.scalar(sa.select(_meta.c.value).where(_meta.c.name == "schema"))
            if version != str(SCHEMA):
                raise ArtifactError(
                    f"{self} is a store of schema {version}, this version of Secateur reads schema {SCHEMA}: "
                    "use the version that wrote it, or another store."
                )
            return True
        if self._kind is sqlite and existing:
            raise ArtifactError(f"{self} is a database of something else (tables {', '.join(existing[:3])}).")
        return False

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        """One transaction; what the database says about it as one line. A full disk is an OSError."""
        try:
            with self._engine.begin() as link:
                yield link
        except DBAPIError as error:
            said = " ".join(str(error.orig).split())
            if "not a database" in said:
                raise ArtifactError(f"{self} is no SQLite database.") from error
            raise OSError(f"the store {self} cannot be used: {said}") from error
        except SQLAlchemyError as error:
            raise OSError(f"the store {self} cannot be used: {error}") from error


def _as_url(text: str) -> sa.URL:
    if not text:
        raise InputError("the store has no name: write sqlite:///file.db, postgresql://... or the path of a file.")
    if "://" not in text:
        return sa.URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError) as error:
        raise InputError(f"{text!r} is no URL of a database: write sqlite:///file.db or postgresql://...") from error
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername.partition("+")[0] not in ("sqlite", "postgresql"):
        raise InputError(f"{url.drivername}: a store is SQLite or PostgreSQL.")
    return url


def _options(url: sa.URL) -> dict[str, Any]:
    return (
        {"connect_args": {"timeout": BUSY_SECONDS}} if url.drivername.startswith("sqlite") else {"pool_pre_ping": True}
    )


def _row(raw: Mapping[Any, Any]) -> Row:
    record = None if raw["record"] is None else Record.from_json(raw["record"])
    return Row(raw["key"], raw["finished"], raw["seconds"], record, raw["error"])


def flat(row: Row) -> dict[str, Any]:
    """A row as plain columns: for CSV, Parquet and data frames. Pairs become two columns, tables JSON."""
    found: dict[str, Any] = {"key": row.key, "finished": row.finished, "error": row.error}
    if row.record is None:
        return found
    for name, value in json.loads(row.record.to_json()).items():
        if name in ("params", "macs", "latency_ms"):
            found |= {f"{name}_dense": value[0], f"{name}_pruned": value[1]}
        elif isinstance(value, (list, dict)):
            found[name] = json.dumps(value, separators=(",", ":"))
        elif name not in found:
            found[name] = value
    return found
