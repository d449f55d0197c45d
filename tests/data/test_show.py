from rslightning.__main__ import main
from rslightning.batch import IGNORED
from rslightning.data.show import describe_blocks, mark


def test_targets_are_marked(make_data):
    data = make_data()
    data.setup("fit")
    ids = data.tokenizer("one two three", add_special_tokens=False)["input_ids"]
    labels = [IGNORED, *ids[1:-1], IGNORED]
    pieces = [data.tokenizer.decode(part) for part in (ids[:1], ids[1:-1], ids[-1:])]
    assert mark(data.tokenizer, ids, labels) == f"{pieces[0]}«{pieces[1]}»{pieces[2]}"


def test_a_block_shows_its_examples(make_data):
    data = make_data(packing=True)
    data.setup("fit")
    legend, header, *examples = describe_blocks(data, 1)
    block = data.train[0]
    assert "«" in legend
    assert header == f"== block 1: {sum(block.lengths)} tokens, {len(block.lengths)} examples"
    assert len(examples) == len(block.lengths) > 1
    assert all(text.endswith("</s>»") for text in examples)


def test_the_command_shows_what_the_model_sees(tmp_path, model_folder, orca_folder, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model:
  base_model: {model_folder}
  adapter: {{rank: 2}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.001}}}}
data:
  class_path: rslightning.data.OpenOrca
  init_args: {{path: {orca_folder}, max_length: 128}}
trainer: {{logger: false}}
"""
    )
    assert main(["data", "show", "-n", "1", "--config", str(recipe), "--data.seed", "3"]) == 0
    output = capsys.readouterr().out
    assert "== block 1: " in output
    assert "<s>### Question:\n" in output
    assert "</s>»" in output
