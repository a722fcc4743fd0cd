"""Whatever an archive holds: no code of it runs, and good ones load as before."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from ranger_nn.cli.archive.load import load_archive, nothing_unpickled
from ranger_nn.cli.main import main
from ranger_nn.errors import InputError
from tests.cli.archive.models import good


class Evil:
    """Unpickled, it makes the marker."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def records_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def damaged(archives, tmp_path, name, change):
    """The good archive `name` with its model's JSON changed."""
    records = records_of(archives[name][0])
    (model,) = (record for record in records if record.endswith("models/model.json"))
    content = json.loads(records[model])
    change(content)
    return write(tmp_path / "bad.pt2", records | {model: json.dumps(content).encode()})


def refused(path, marker, monkeypatch, word=""):
    """Refused before PyTorch's loader, in one line that names the file."""

    def loader(*arguments, **options):
        pytest.fail("PyTorch's loader was called")

    monkeypatch.setattr(torch.export, "load", loader)
    with pytest.raises(InputError) as caught:
        load_archive(str(path))
    assert "bad.pt2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert word in str(caught.value)
    assert not marker.exists()


def put(content, place, value):
    """Set the value at a place such as "graph_module/graph/nodes/0/target"; a function is given the old one."""
    *parents, last = (int(part) if part.isdigit() else part for part in place.split("/"))
    for part in parents:
        content = content[part]
    content[last] = value(content[last]) if callable(value) else value


# ------------------------------------------------------------------------------------- good ones


@pytest.mark.parametrize("name", list(good()))
def test_a_good_archive_loads(archives, name):
    path, module, args, kwargs = archives[name]
    given, expected = load_archive(str(path))(*args, **kwargs), module(*args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves
    assert torch.utils._pytree.tree_structure(given) == torch.utils._pytree.tree_structure(expected)
    for a, b in zip(leaves(given), leaves(expected), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_good_archive_zipped_anew(archives, tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "again.pt2", "w", compression) as archive:
        for name, content in records_of(archives["auto"][0]).items():
            archive.writestr(name, content)
    assert load_archive(str(tmp_path / "again.pt2"))(torch.rand(1, 3, 8, 8)).shape == (1, 3, 16, 16)


def test_a_good_archive_on_the_command_line(archives, tmp_path, capsys):
    assert main(["run", str(archives["auto"][0]), "1x3x24x16", "-o", str(tmp_path / "o.npy"), "--quiet"]) == 0
    assert np.load(tmp_path / "o.npy").shape == (1, 3, 48, 32)


# -------------------------------------------------------------------------------- texts as code

NODE = "graph_module/graph/nodes/0"
CALL = "graph_module/module_call_graph/0/signature"


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir(r'{}') or Symbol('s0')",
        "Symbol('s0').__class__.__base__",
        "(lambda: 1)()",
        "[x for x in (1, 2)]",
        "(s0 := 1)",
        "f'{{s0}}'",
        "Symbol('s0' + 's1')",
        'Symbol("s0\'); import os #")',
        "Symbol('s0', positive=__import__('os'))",
        "Integer('1')",
        "Function('f')(1)",
        "parse_expr('1')",
        "s0 # remark",
        "(s0\n)",
        "getattr(s0, 'x')",
        "9**9**9**9",
        "Pow(Integer(9), Integer(999999999))",
        "1 << 10**9",
        "PowByNatural(PowByNatural(PowByNatural(9**64, 64), 64), 64)",
        "9" * 50_000,
        "(" * 5_000 + "s0" + ")" * 5_000,
        "",
        "\x00",
    ],
)
def test_a_shape_expression_that_is_more_than_arithmetic(archives, tmp_path, marker, monkeypatch, text):
    text = text.replace("{}", str(marker)).replace("{{", "{").replace("}}", "}")

    def change(content):
        sizes = content["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[2]["as_expr"]["expr_str"] = text

    refused(damaged(archives, tmp_path, "dim", change), marker, monkeypatch, "expr_str")


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.load",
        "torch.hub.load",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten.relu.default.__call__",
        "torch.ops.aten.__class__.mro",
        "torch.ops.higher_order.print",
        "torch.ops.higher_order.call_torchbind",
        "torch.ops.debugprims.load_tensor.default",
        "torch.ops.ranger_tests_archive.gone.default",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.__loader__.load_module",
        "#custom:op",
        "builtins.eval",
        "cond",
        "",
    ],
)
def test_a_target_that_is_no_operator(archives, tmp_path, marker, monkeypatch, target):
    bad = damaged(archives, tmp_path, "dim", lambda content: put(content, f"{NODE}/target", target))
    refused(bad, marker, monkeypatch, "'relu'.target")


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("dim", f"{NODE}/name", "a = __import__('os')\nb"),
        ("dim", f"{NODE}/name", "a; import os"),
        ("dim", f"{NODE}/inputs/0/arg", {"as_operator": "torch.os.system"}),
        ("dim", f"{NODE}/inputs/0/name", "x=exit(), y"),
        ("dim", f"{NODE}/inputs/0/arg", {"as_int": "exit()"}),
        ("dim", f"{NODE}/inputs/0/arg", {"as_device": {"type": "cpu')+exit()#", "index": None}}),
        ("dim", f"{NODE}/inputs/0/arg", {"as_unheard_of": 1}),
        ("dim", f"{NODE}/metadata/source_fn_stack", "relu,torch.os.__dict__"),
        ("dim", "graph_module/graph/inputs/0/as_tensor/name", "x, y=exit()"),
        ("dim", "graph_module/graph/tensor_values", lambda old: {"x) + exit(": old["x"]}),
        ("dim", "graph_module/graph/inputs", lambda old: [*old, {"as_string": "'+str(exit())+'"}]),
        ("dim", "graph_module/signature/input_specs/0", {"parameter": {"arg": {"name": "x"}, "parameter_name": 'a"b'}}),
        ("dim", "graph_module/signature/input_specs/0", {"parameter": {"arg": {"name": "x"}, "parameter_name": "a.__class__.b"}}),
        ("dim", "guards_code", ["__import__('os').system('true') == 0"]),
        ("dim", "guards_code", ["L['x'].size()[0] >= 2) or exit(("]),
        ("dim", "guards_code", ["L['x'].__class__ != 0"]),
        ("dim", "guards_code", ["L['x'].numpy().tofile('a') == 0"]),
        ("dim", "guards_code", ["torch.os.system('true') == 0"]),
        ("dim", "guards_code", ['L["it\'s"].size()[0] == 0']),
        ("dim", "guards_code", ["9**9**9**9 > L['x'].size()[0]"]),
        ("dim", "guards_code", "L['x']"),
        ("dim", "range_constraints", {"s53": {"min_val": "exit()", "max_val": 4}}),
        ("dim", "range_constraints", {"exit()": {"min_val": 2, "max_val": 4}}),
        ("dim", "verifiers", ["../x"]),
        ("dim", "graph_module/graph/tensor_values/x/sizes/2/as_expr/hint", {"as_int": "exit()"}),
        ("dim", "graph_module/graph/tensor_values/x/sizes/2", {"as_int": "exit()"}),
        ("dim", "graph_module/graph/tensor_values/x/dtype", "exit()"),
        ("dim", f"{CALL}/forward_arg_names", ["x, y=exit()"]),
        ("trees", f"{CALL}/in_spec", lambda old: old.replace("x-1", "x':exit(),'y")),
        ("trees", f"{CALL}/out_spec", lambda old: old.replace("collections.OrderedDict", "os.system")),
        ("dim", f"{CALL}/out_spec", '[1, {"type": "builtins.list", "context": "{}", "children_spec": "os"}]'),
        ("dim", f"{CALL}/out_spec", "[1, [1]]"),
        ("dim", f"{CALL}/out_spec", "no JSON"),
        ("branch", "graph_module/graph/nodes", lambda old: json.loads(json.dumps(old).replace("aten.sin", "os.sin"))),
    ],
)  # fmt: skip
def test_a_text_that_would_become_code(archives, tmp_path, marker, monkeypatch, name, place, value):
    bad = damaged(archives, tmp_path, name, lambda content: put(content, place, value))
    refused(bad, marker, monkeypatch, "models/model.json")


@pytest.mark.parametrize(
    "context",
    [
        {"default_factory_module": "os", "default_factory_name": "abort", "dict_context": ["a"]},
        {"default_factory_module": "builtins", "default_factory_name": "exit", "dict_context": ["a"]},
        json.dumps([{"__enum__": True, "fqn": "antigravity:X", "name": "Y"}]),
    ],
)
def test_a_tree_that_imports_a_module(archives, tmp_path, marker, monkeypatch, context):
    leaf = {"type": None, "context": None, "children_spec": []}
    kind = "collections.defaultdict" if isinstance(context, dict) else "builtins.dict"
    spec = json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])
    bad = damaged(archives, tmp_path, "dim", lambda content: put(content, f"{CALL}/out_spec", spec))
    refused(bad, marker, monkeypatch, "out_spec")


def test_an_expression_of_every_kind_is_let_through():
    from ranger_nn.cli.archive.expressions import expression, guard

    for text in (
        "Max(Integer(1), FloorDiv(Add(Symbol('s0', positive=True, integer=True), Integer(-1)), Integer(2)))",
        "s0 + 3*s1//2 - Mod(s2, 4)",
        "Pow(Symbol('s0', integer=True), Rational(1, 2))",
        "Mul(Float('0.5', precision=53), ToFloat(Symbol('u0', integer=True)))",
        "And(GreaterThan(Symbol('u0', integer=True), Integer(0)), Not(Eq(s0, 4)))",
        "-int_oo",
    ):
        expression(text)
    for text in (
        "max(1, math.floor(L['x'].size()[0] / 2)) != L['args'][0][1].stride()[2]",
        "(L['d']['k-1'].size()[0] % 4) == 0 and not (L['n'] == 3)",
        "(1 if L['x'].storage_offset() > 0 else 2) < torch.sym_float(L['flat_args'][0].size()[1])",
    ):
        guard(text)


# ------------------------------------------------------------------------------ what is unpickled


def test_nothing_is_unpickled_whatever_the_reader_asks_for(tmp_path, marker):
    torch.save(Evil(marker), tmp_path / "weights")
    with nothing_unpickled(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "weights", weights_only=False)
    assert not marker.exists()


@pytest.mark.parametrize("record", ["opaque_obj_0", "custom_obj_0", "../weight_0", "tensor_99"])
def test_a_constant_that_is_an_object(archives, tmp_path, marker, monkeypatch, record):
    records = records_of(archives["auto"][0])
    (table,) = (name for name in records if name.endswith("constants_config.json"))
    content = json.loads(records[table])
    content["config"]["loose"].update(path_name=record, use_pickle=True, tensor_meta=None)
    records[table] = json.dumps(content).encode()
    if record[0] in "oc":
        records[f"{table.partition('/')[0]}/data/constants/{record}"] = pickle.dumps(Evil(marker))
    refused(write(tmp_path / "bad.pt2", records), marker, monkeypatch)


def test_pickled_weights(archives, tmp_path, marker):
    """PyTorch reads these itself, told to load tensors only."""
    records = records_of(archives["auto"][0])
    (table,) = (name for name in records if name.endswith("weights_config.json"))
    content = json.loads(records[table])
    content["config"]["first.weight"].update(use_pickle=True)
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer)
    weight = f"{table.partition('/')[0]}/data/weights/{content['config']['first.weight']['path_name']}"
    bad = write(tmp_path / "bad.pt2", records | {table: json.dumps(content).encode(), weight: buffer.getvalue()})
    with pytest.raises(InputError, match="without unpickling"):
        load_archive(str(bad))
    assert not marker.exists()


def test_a_weight_that_asks_for_the_whole_machine(archives, tmp_path, marker, monkeypatch):
    records = records_of(archives["auto"][0])
    (table,) = (name for name in records if name.endswith("weights_config.json"))
    content = json.loads(records[table])
    content["config"]["first.weight"]["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}]
    weight = f"{table.partition('/')[0]}/data/weights/{content['config']['first.weight']['path_name']}"
    bad = write(tmp_path / "bad.pt2", records | {table: json.dumps(content).encode(), weight: b""})
    refused(bad, marker, monkeypatch, "is empty")


@pytest.mark.parametrize("inputs", ["object", "key"])
def test_sample_inputs(archives, tmp_path, marker, monkeypatch, inputs):
    records = records_of(archives["dim"][0])
    (sample,) = (name for name in records if "/sample_inputs/" in name)
    buffer = io.BytesIO()
    torch.save(Evil(marker) if inputs == "object" else (({"it's": torch.rand(1)},), {}), buffer)
    bad = write(tmp_path / "bad.pt2", records | {sample: buffer.getvalue()})
    refused(bad, marker, monkeypatch)


# ------------------------------------------------------------------------------------- the zip file


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ("{}/models/MODEL.json", "twice"),
        ("{}/models/../model.json", "relative"),
        ("/models/model.json", "relative"),
        ("{}\\models/model.json", "relative"),
        ("{}/data/aotinductor/model/x.so", "compiled code"),
        ("{}/data/other", "only"),
        ("{}/models/evil.py", "only"),
        ("{}/models/second.json", "models/second.json"),
        ("version", "one folder"),
    ],
)
def test_a_record_too_many(archives, tmp_path, marker, monkeypatch, record, word):
    records = records_of(archives["dim"][0])
    extra = {record.format("dim"): b'{"graph_module": 1}'}
    refused(write(tmp_path / "bad.pt2", records | extra), marker, monkeypatch, word)


def test_the_same_name_twice(archives, tmp_path, marker, monkeypatch):
    bad = write(tmp_path / "bad.pt2", records_of(archives["dim"][0]))
    with zipfile.ZipFile(bad, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("dim/models/model.json", b"{}")
    refused(bad, marker, monkeypatch, "twice")


def test_an_archive_of_an_older_pytorch(tmp_path, marker, monkeypatch):
    records = {"version": b"8.8", "serialized_exported_program.json": b"{}", "serialized_state_dict.pt": b""}
    refused(write(tmp_path / "bad.pt2", records), marker, monkeypatch, "save it again")


def test_data_before_the_archive(archives, tmp_path, marker, monkeypatch):
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04" + bytes(100) + archives["dim"][0].read_bytes())
    refused(tmp_path / "bad.pt2", marker, monkeypatch, "first byte")


def test_a_record_whose_two_names_differ(archives, tmp_path, marker, monkeypatch):
    content = archives["dim"][0].read_bytes()
    (tmp_path / "bad.pt2").write_bytes(content.replace(b"dim/models/model.json", b"dim/models/modal.json", 1))
    refused(tmp_path / "bad.pt2", marker, monkeypatch, "sound zip file")


def test_a_zip_bomb(archives, tmp_path, marker, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bad.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records_of(archives["dim"][0]).items():
            archive.writestr(name, content)
        archive.writestr("dim/extra/zeros", bytes(70 << 20))
    refused(tmp_path / "bad.pt2", marker, monkeypatch, "unpack")


@pytest.mark.parametrize("length", [0, 10, 3000])
def test_a_file_cut_short(archives, tmp_path, marker, monkeypatch, length):
    (tmp_path / "bad.pt2").write_bytes(archives["dim"][0].read_bytes()[:length])
    refused(tmp_path / "bad.pt2", marker, monkeypatch)


@pytest.mark.parametrize("text", [b"", b"no JSON", b"[]", b"[" * 100_000, b"{}"])
def test_a_model_that_is_no_json(archives, tmp_path, marker, text):
    bad = write(tmp_path / "bad.pt2", records_of(archives["dim"][0]) | {"dim/models/model.json": text})
    with pytest.raises(InputError):
        load_archive(str(bad))


def test_what_else_pytorch_keeps_in_zip_files(tmp_path, marker, monkeypatch):
    torch.save({"weight": torch.rand(2)}, tmp_path / "bad.pt2")
    refused(tmp_path / "bad.pt2", marker, monkeypatch, "torch.save")
    torch.jit.trace(torch.nn.ReLU(), torch.rand(2)).save(str(tmp_path / "bad.pt2"))
    refused(tmp_path / "bad.pt2", marker, monkeypatch, "TorchScript")


def test_one_line_on_the_command_line(archives, tmp_path, marker, capfd):
    def change(content):
        put(content, f"{NODE}/target", "torch.os.mkdir")
        put(content, f"{NODE}/inputs", [{"name": "", "arg": {"as_string": str(marker)}, "kind": 1}])

    assert main(["plan", str(damaged(archives, tmp_path, "dim", change)), "1x3x32x32"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "'relu'.target" in line
    assert "'torch.os.mkdir'" in line
    assert not marker.exists()
