"""What the Hub accepts: names of repositories, and the metadata of a card."""

import re

import yaml

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
REPO_ID = re.compile(rf"({NAME.pattern}/)?{NAME.pattern}")
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
LICENSES = _LICENSES.split()
RELATIONS = ("adapter", "merge", "quantized", "finetune")
NO_METADATA = "empty or missing yaml metadata in repo card"


def is_repo_name(name):
    return (
        bool(NAME.fullmatch(name)) and "--" not in name and ".." not in name and not name.endswith((".git", ".ipynb"))
    )


def read_metadata(card):
    """The YAML block that a card starts with, {} if there is none; ValueError if it is no YAML mapping."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if block is None:
        return {}
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError("the metadata is no mapping")
    return metadata


def card_errors(card):
    """What the Hub objects to in a card, a sentence each; such a card can be neither validated nor committed."""
    try:
        metadata = read_metadata(card)
    except ValueError as error:
        return [f"YAML: {error}"]
    return [*_simple_errors(metadata), *_reference_errors(metadata), *_index_errors(metadata.get("model-index"))]


def _listed(value):
    return value if isinstance(value, list) else [value]


def _simple_errors(metadata):
    for license_ in _listed(metadata.get("license", "other")):
        if license_ not in LICENSES:
            yield f'"license" must be one of [{", ".join(LICENSES)}]'
    for field in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if field in metadata and not isinstance(metadata[field], str):
            yield f'"{field}" must be a string'
    for field in ("tags", "metrics"):
        values = metadata.get(field, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            yield f'"{field}" must be an array of strings'
    for language in _listed(metadata.get("language", [])) if metadata.get("language") else ():
        if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", language):
            yield f'"language" with value "{language}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code'
    if "widget" in metadata and not isinstance(metadata["widget"], list):
        yield '"widget" must be an array'
    if metadata.get("base_model_relation", "merge") not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'


def _reference_errors(metadata):
    for base in _listed(metadata.get("base_model") or []):
        if not isinstance(base, str) or not REPO_ID.fullmatch(base):
            yield f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
    for index, dataset in enumerate(_listed(metadata.get("datasets") or [])):
        if not isinstance(dataset, str) or not REPO_ID.fullmatch(dataset):
            yield f'"datasets[{index}]" with value "{dataset}" is not valid. Use a dataset id from https://hf.co/datasets.'


def _index_errors(index):
    if index is None:
        return
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            yield f'"{where}.name" is required'
            continue
        results = model.get("results")
        if not isinstance(results, list):
            yield f'"{where}.results" must be an array'
            continue
        for j, result in enumerate(results):
            yield from _result_errors(result, f"{where}.results[{j}]")


def _result_errors(result, where):
    if not isinstance(result, dict):
        yield f'"{where}" must be an object'
        return
    for field, needed in {"task": ("type",), "dataset": ("type", "name")}.items():
        for key in needed:
            if not isinstance((result.get(field) or {}).get(key), str):
                yield f'"{where}.{field}.{key}" is required'
    for key in ("config", "split", "revision"):
        if not isinstance((result.get("dataset") or {}).get(key, ""), str):
            yield f'"{where}.dataset.{key}" must be a string'
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield f'"{where}.metrics" must be an array with at least one metric'
        return
    for k, metric in enumerate(metrics):
        for key in ("type", "value"):
            if not isinstance(metric, dict) or metric.get(key) is None:
                yield f'"{where}.metrics[{k}].{key}" is required'
