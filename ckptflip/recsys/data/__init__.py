"""Click logs: the official files of Criteo and MovieLens, and a generated log whose best AUC is known.

- `logs`: what every reader gives; `splits`: training, validation and test rows that do not leak.
- `criteo`: the Kaggle and the Terabyte files; `ids`: how a raw value becomes a row of a table.
- `movielens`: MovieLens-1M and -20M.
- `clicks`: the generated log; `truth`: the click probabilities planted in it; `best`: the best AUC that
  they allow; `tsv`: a log as a file in Criteo's layout.
- `lines`, `cells`: reading big files of lines fast, malformed lines set aside.

Importing this package imports no framework.
"""
