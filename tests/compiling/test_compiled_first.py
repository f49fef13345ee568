"""The first call in a process is a compiled one, as with `torch_compile=True`. Each test has a process of its own."""

import pytest


START = """
import threading, warnings
warnings.simplefilter("ignore")
import torch
from helpers.models import adapt, make_inputs, make_llava, without_labels
"""

SCRIPTS = {
    "in another thread, then in a further one, then in the first": """
model, found = adapt(make_llava(num_layers=(2, 1))), []
compiled = torch.compile(model, backend="aot_eager")
def call():
    found.append(compiled(**make_inputs("left")).loss)
for _ in range(2):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
call()
expected = model(**make_inputs("left")).loss
assert len(found) == 3
for loss in found:
    torch.testing.assert_close(loss, expected)
""",
    "placement image, an adapter for each sample": """
model = adapt(make_llava(num_layers=(2, 1)), interaction_placement="image").eval()
model.add_adapter("other", model.peft_config["default"])
model.eval()
inputs = without_labels(make_inputs("none", num_image_tokens=6))
with torch.no_grad():
    names = ["default", "other"]
    logits = torch.compile(model, backend="eager")(**inputs, adapter_names=names).logits
    torch.testing.assert_close(logits, model(**inputs, adapter_names=names).logits)
""",
    "Trainer": """
import tempfile
from transformers import Trainer, TrainingArguments
model = adapt(make_llava(num_layers=(2, 1)))
rows = [{name: value[i] for name, value in make_inputs("right").items()} for i in range(2)]
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
    torch_compile=True, torch_compile_backend="aot_eager", disable_tqdm=True,
)
before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)
compiled = trainer.model_wrapped
assert isinstance(compiled, torch._dynamo.OptimizedModule)
torch.testing.assert_close(compiled(**make_inputs("right")).loss, model(**make_inputs("right")).loss)
""",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_first_call_is_compiled(script, fresh):
    result = fresh.code(START + script)
    assert result.returncode == 0, result.stderr[-2000:]
