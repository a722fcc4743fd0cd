"""A .pt2 archive that may come from anyone: looked through before PyTorch's own loader sees it.

`torch.export.load` turns text into code in many places: shape expressions and guards are evaluated,
operators are found by attribute look-up, names become lines of generated Python, trees import
modules, objects are unpickled, compiled libraries are opened. `weights_only` covers one of them.
So every text of the archive is held to a grammar first, and what has no rule here is refused:

- `container`: the zip file's records, before any is read;
- `program`: the model as JSON, field by field along PyTorch's own schema;
- `expressions`, `words`, `operators`, `trees`: the rules of its texts;
- `payload`: the tables of weights and constants, and the sample inputs.

Enter at `load.load_archive`.
"""
