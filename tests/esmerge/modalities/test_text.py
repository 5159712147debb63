"""Items that the LLM reads as they are."""

import pytest

from esmerge.errors import InputError
from esmerge.modalities.registry import modality_from_settings, modality_settings, open_modality, save_modality


def test_an_item_takes_its_place_in_the_template():
    modality = modality_from_settings({"kind": "text", "placeholder": "<cell>", "template": "[{item}]"}, "here")
    assert modality.render("CD3D, LYZ") == "[CD3D, LYZ]"
    with pytest.raises(InputError, match="<cell> is empty"):
        modality.render(" , ")


def test_long_items_are_cut_off_if_that_is_asked_for(tmp_path):
    settings = {"kind": "text", "placeholder": "<protein>", "template": "{item}.", "max_characters": 4}
    modality = modality_from_settings(settings, "here")
    assert [modality.render(item) for item in ("MKT", "MKTAYI")] == ["MKT.", "MKTA."]
    save_modality(modality, tmp_path)
    assert modality_settings(open_modality(tmp_path)) == settings
    with pytest.raises(InputError, match="max_characters"):
        modality_from_settings({**settings, "max_characters": 0}, "here")
