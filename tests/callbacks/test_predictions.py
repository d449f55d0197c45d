import json

from rslightning.callbacks.predictions import WritePredictions


def test_every_row_is_written_beside_its_reference(make_trainer, make_module, make_data, tmp_path):
    module, data = make_module(), make_data(batch_size=3)
    answers = make_trainer(callbacks=[WritePredictions()]).predict(module, data)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["prompt"], row["reference"]) for row in rows] == data.held_out_rows
    assert len(rows) == 7
    ids = [answer for batch in answers for answer in batch]
    decoded = [data.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]
    assert [row["answer"] for row in rows] == decoded


def test_a_second_pass_starts_a_new_file(make_trainer, make_module, make_data, tmp_path):
    for _ in range(2):
        make_trainer(callbacks=[WritePredictions()]).predict(make_module(), make_data())
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 7
