"""Times of a log: numbers as they are, dates as `datetime64` in UTC."""

import contextlib
import datetime
import logging
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from seqfair_jax.data.ids import comma_advice, first_of
from seqfair_jax.errors import UserError

_LOG = logging.getLogger("seqfair_jax")
_ZONE = r"\d:\d\d.*(?:[zZ]|[+-]\d\d(?::?\d\d)?)\s*$|(?:UTC|GMT)\s*$"  # of an ISO date
_DAY_OR_MONTH_FIRST = re.compile(r"\s*\d{1,2}[/.]\d{1,2}[/.]\d{2,4}\b.*")
# Seconds, milliseconds, microseconds and nanoseconds since 1970, each from 1973 to 5138.
_UNITS = {"seconds": 1e8, "milliseconds": 1e11, "microseconds": 1e14, "nanoseconds": 1e17}
_PANDAS_UNITS = {"seconds": "s", "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}


def is_time_format(text: str) -> bool:
    """Whether text is a strptime format that has a year."""
    try:
        pd.to_datetime(["text"], format=text, errors="coerce")
    except (ValueError, re.error):  # an unknown directive, or one that appears twice
        return False
    return re.search("%[YyG]", text) is not None


def parse_times(
    column: pa.ChunkedArray,
    rows: np.ndarray,
    where: str,
    name: str,
    *,
    time_format: str = "",
    advice: str = "",
) -> np.ndarray:
    """A column of times, without missing ones.

    Text is read as integers if every value is one, else as floats, else as ISO dates. Dates
    without a zone are in UTC.

    Args:
        column, rows, where, name: see `ids.require_values`.
        time_format: the strptime format of text and of numbers such as 20241231; columns of dates
            need none. '' to find out the kind of time.
        advice: what to do about dates in another form than ISO, for the message.

    Returns:
        i64[N], f64[N] or `datetime64`[N] of the resolution that the column needs.

    Raises:
        UserError: naming the first row that is not a time like the others or not one of the
            format, or the column's type.
    """
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if time_format and (is_number or pa.types.is_large_string(kind)):
        return _from_format(column, rows, where, name, time_format)
    if pa.types.is_large_string(kind):
        times = _from_text(column, rows, where, name, advice)
    elif is_number:
        times = column.to_numpy()
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        times = column.cast(pa.timestamp(getattr(kind, "unit", "s"))).to_numpy()
    elif not len(column):
        return np.empty(0, np.int64)
    else:
        raise UserError(
            f"{where}: column {name} is of type {kind}; expected numbers or dates in every row"
        )
    if times.dtype.kind == "f" and not np.isfinite(times).all():
        bad = ~np.isfinite(times)
        raise _bad_time(column, bad, rows, where, name, _expected(column[bad.argmax()], advice))
    return times


def _from_format(
    column: pa.ChunkedArray, rows: np.ndarray, where: str, name: str, time_format: str
) -> np.ndarray:
    text = column
    if pa.types.is_floating(column.type):  # what integers beside missing ones often become
        with contextlib.suppress(pa.ArrowInvalid):
            text = column.cast(pa.int64())
    series = _series(pc.utf8_trim_whitespace(text.cast(pa.large_string())))
    dates = pd.to_datetime(series, errors="coerce", utc=True, format=time_format.strip())
    times = dates.dt.tz_localize(None).to_numpy()
    # pandas reads these two words in every format, as the time of the call.
    bad = np.isnat(times) | series.isin(["now", "today"]).to_numpy(bool)
    if bad.any():
        expected = f"expected a time of data.time_format={time_format!r}"
        raise _bad_time(column, bad, rows, where, name, expected)
    return times


def _series(text: pa.ChunkedArray) -> pd.Series:
    return text.to_pandas(types_mapper={text.type: pd.StringDtype("pyarrow")}.get)


def _from_text(
    text: pa.ChunkedArray, rows: np.ndarray, where: str, name: str, advice: str
) -> np.ndarray:
    kinds = [pa.int64(), pa.float64()]  # integers above 2**53, such as nanoseconds, are no floats
    kinds += [pa.timestamp(unit, zone) for zone in (None, "UTC") for unit in ("us", "ns")]
    column = text
    if len(text) and text[0].as_py().endswith(("UTC", "GMT")):
        column = pc.replace_substring_regex(text, r"\s?(UTC|GMT)$", "Z")
    for kind in kinds:  # a wrong kind fails at the first value
        with contextlib.suppress(pa.ArrowInvalid):
            return column.cast(kind).to_numpy()
    # Slower, for what is left: blanks around numbers, dates with and without zones, errors.
    series = _series(text)
    numbers = pd.to_numeric(series, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    bad = ~np.isfinite(numbers)
    if not bad.all():
        times = numbers
    else:
        _warn_of_zones(series, where, name)
        series = series.str.replace(r"\s?(UTC|GMT)$", "", regex=True)
        dates = pd.to_datetime(series, errors="coerce", utc=True, format="ISO8601")
        times = dates.dt.tz_localize(None).to_numpy()
        bad = np.isnat(times)
    if bad.any():
        raise _bad_time(text, bad, rows, where, name, _expected(text[bad.argmax()], advice))
    return times


def _warn_of_zones(dates: pd.Series, where: str, name: str) -> None:
    """Warn if some dates have a zone and others have none: those may be hours off."""
    has_zone = dates.str.contains(_ZONE, regex=True, na=False)
    if has_zone.any() and not has_zone.all():
        _LOG.warning(
            "%s: %s of the %s dates of column %s have no time zone, and the others have one; dates "
            "without a zone are taken as UTC",
            where, f"{int((~has_zone).sum()):,}", f"{len(dates):,}", name,
        )  # fmt: skip


def _expected(value: pa.Scalar, advice: str) -> str:
    """What was expected instead of a bad time, without a format."""
    expected = "expected a finite number in every row, or an ISO date in every row"
    if not isinstance(value.as_py(), str):
        return expected
    if _DAY_OR_MONTH_FIRST.fullmatch(value.as_py()):
        expected = "its day and month cannot be told apart; write dates as 2024-12-31"
    if comma := comma_advice(value.as_py()):
        return f"expected a number{comma}"
    return f"{expected}{', or ' * bool(advice)}{advice}"


def _bad_time(
    column: pa.ChunkedArray,
    bad: np.ndarray,
    rows: np.ndarray,
    where: str,
    name: str,
    expected: str,
) -> UserError:
    first = bad.argmax()
    found = f"data row {rows[first] + 1} is {column[first].as_py()!r}{first_of(bad)}"
    return UserError(f"{where}: the {name} of {found}; {expected}")


def join_times(parts: list[np.ndarray], files: list[str]) -> np.ndarray:
    """The times of several files as those of one.

    Raises:
        UserError: if one has numbers and another has dates, or if their dates need a resolution
            that cannot hold all of them.
    """
    kinds = ["dates" if times.dtype.kind == "M" else "numbers" for times in parts]
    if len(set(kinds)) > 1:
        other = kinds.index("dates" if kinds[0] == "numbers" else "numbers")
        raise UserError(
            f"the times of {files[0]} are {kinds[0]}, but those of {files[other]} are "
            f"{kinds[other]}; write all files alike"
        )
    joined = np.concatenate(parts)
    if kinds[0] == "dates":
        starts = np.cumsum([0, *map(len, parts)])
        for times, start, file in zip(parts, starts, files, strict=False):
            if (joined[start : start + len(times)].astype(times.dtype) != times).any():
                raise UserError(
                    f"{file}: its dates go beyond the years 1678 to 2262, and another file has "
                    "nanoseconds; write all files with one resolution"
                )
    return joined


def doubtful_units(times: np.ndarray) -> str:
    """What is doubtful in the units of numbers, for a warning; "" if they are alike."""
    if times.dtype.kind == "M" or not (found := _units(times)):
        return ""
    if len(found) > 1:
        return (
            f"some times look like {' and '.join(found)} since 1970; write them in one unit, or "
            "their order is wrong"
        )
    low = times < _UNITS["seconds"]
    if not low.any():
        return ""
    return (
        f"some times look like {found[0]} since 1970, but {low.sum():,} others do not, such as "
        f"{time_text(times.min())}; correct them or remove these rows, or their order is wrong"
    )


def _units(times: np.ndarray) -> list[str]:
    """The units of time since 1970 that numbers seem to be of."""
    edges = [*_UNITS.values(), 1e20]
    return [
        unit
        for unit, low, high in zip(_UNITS, edges, edges[1:], strict=False)
        if ((times >= low) & (times < high)).any()
    ]


def parse_bound(value: str | float, setting: str) -> int | float | np.datetime64:
    """A number, or an ISO date as `datetime64` in UTC.

    Raises:
        UserError: naming the setting, if it is neither.
    """
    for number in (int, float):
        with contextlib.suppress(ValueError):
            found = number(str(value))
            if np.isfinite(found):
                return found
    try:
        date = datetime.datetime.fromisoformat(str(value).strip())
        if date.tzinfo is not None:
            date = date.astimezone(datetime.UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise UserError(
            f"{setting} is {value!r}: expected an ISO date such as 2024-12-31, or a number"
        ) from None
    return np.datetime64(date)


def within(times: np.ndarray, since: str | None, until: str | None, where: str) -> np.ndarray:
    """Which times are in [since, until): bool[N]; None is no bound.

    Raises:
        UserError: if a bound is a date and the times are numbers, or the other way round.
    """
    keep = np.ones(len(times), bool)
    for setting, value, sign in (("since", since, 1), ("until", until, -1)):
        if value is None:
            continue
        bound = comparable_bound(value, times, f"data.{setting}", where)
        keep &= times >= bound if sign > 0 else times < bound
    return keep


def comparable_bound(
    value: str, times: np.ndarray, setting: str, where: str
) -> int | float | np.datetime64:
    """`parse_bound` of a setting that is compared with times.

    A date is given in the unit of numbers that all look like times since 1970.

    Raises:
        UserError: if it is a date and the times are numbers, or the other way round.
    """
    bound = parse_bound(value, setting)
    is_date = times.dtype.kind == "M"
    if isinstance(bound, np.datetime64) and not is_date:
        units = _units(times)
        if len(units) == 1 and not doubtful_units(times):
            return int(bound.astype(f"datetime64[{_PANDAS_UNITS[units[0]]}]").astype(np.int64))
    if is_date != isinstance(bound, np.datetime64):
        kinds = ("dates", "a number") if is_date else ("numbers", "a date")
        raise UserError(
            f"{setting} is {value}, {kinds[1]}, but the times of {where} are {kinds[0]}; give it "
            "as the log's times are"
        )
    return bound


def time_text(time: float | np.number | np.datetime64) -> str:
    """A time as text that `parse_bound` reads: an ISO date in UTC, or a number."""
    if isinstance(time, np.datetime64):
        return pd.Timestamp(time).isoformat()
    return str(time.item() if isinstance(time, np.number) else time)


def with_date(text: str) -> str:
    """A time as `time_text` gives it; a number that is one since 1970 with its date behind it."""
    time = parse_bound(text, "a time")
    if isinstance(time, np.datetime64):
        return text
    for unit, least in reversed(_UNITS.items()):
        if least <= time < 1e20:
            date = pd.Timestamp(time, unit=_PANDAS_UNITS[unit])
            return f"{text} ({date.isoformat(sep=' ', timespec='seconds')} UTC)"
    return text
