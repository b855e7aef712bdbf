"""Small files in the layouts of the official data sets, byte for byte but for their size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CATEGORIES = [f"{0x68FD1E64 + number * 0x01010101 & 0xFFFFFFFF:08x}" for number in range(26)]
COUNTS = ["1", "1", "5", "0", "1382", "4", "15", "2", "181", "1", "2", "", "2"]


def criteo_line(
    label: str = "0", counts: Sequence[str] = COUNTS, categories: Sequence[str] = CATEGORIES
) -> str:
    """A line of train.txt or of a day, without its end."""
    return "\t".join([label, *counts, *categories])


def criteo_file(path: Path, lines: Sequence[str], end: str = "\n") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode("latin-1"))
    return path


RATINGS = [
    "1::1193::5::978300760",
    "1::661::3::978302109",
    "2::1193::4::978298413",
    "6040::3952::1::956703932",
]
USERS = ["1::F::1::10::48067", "2::M::56::16::70072", "6040::M::25::6::11106"]
MOVIES = [
    "661::James and the Giant Peach (1996)::Animation|Children's|Musical",
    "1193::One Flew Over the Cuckoo's Nest (1975)::Drama",
    "3952::Contender, The (2000)::Drama|Thriller",
    "1255::Misérables, Les (1995)::Drama|Musical",
]
RATINGS_CSV = [
    "userId,movieId,rating,timestamp",
    "1,2,3.5,1112486027",
    "1,29,4.0,1112484676",
    "7,2,0.5,1112484819",
]
MOVIES_CSV = [
    "movieId,title,genres",
    "2,Jumanji (1995),Adventure|Children|Fantasy",
    '29,"City of Lost Children, The (Cité des enfants perdus, La) (1995)",(no genres listed)',
]


def movielens_1m(
    folder: Path,
    ratings: Sequence[str] = RATINGS,
    users: Sequence[str] = USERS,
    movies: Sequence[str] = MOVIES,
) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in (("ratings", ratings), ("users", users), ("movies", movies)):
        (folder / f"{name}.dat").write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))
    return folder


def movielens_20m(
    folder: Path, ratings: Sequence[str] = RATINGS_CSV, movies: Sequence[str] = MOVIES_CSV, end: str = "\n"
) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in (("ratings", ratings), ("movies", movies)):
        (folder / f"{name}.csv").write_bytes("".join(line + end for line in lines).encode())
    return folder
