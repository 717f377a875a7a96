"""llm-compressor: GPTQ, AWQ and SparseGPT, as compressed-tensors. Settings: `algorithm` and what its modifier takes."""

import torch
from protocol import Job, load, serve, versions


def work(job: Job) -> dict[str, object]:
    # AWQ pins its activations for an accelerator whether there is one or not; without one that only raises.
    torch.Tensor.pin_memory = lambda self, *_: self
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    settings = dict(job.settings)
    algorithm, group = settings.pop("algorithm"), settings.pop("group", None)
    common = {"targets": "Linear", "ignore": ["lm_head"]}
    if group:
        bits, symmetric = settings.pop("bits"), settings.pop("symmetric", True)
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
        common = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipe = {
        "gptq": lambda: GPTQModifier(**common, **settings),
        "awq": lambda: [AWQModifier(), QuantizationModifier(**common, **settings)],
        "sparsegpt": lambda: SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **settings),
    }[algorithm]()
    model = load(job)
    names = {name for name, _ in model.named_parameters()}
    # One sequence a batch, as its examples have them.
    rows = [{"input_ids": torch.from_numpy(row)[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            for row in job.rows()]  # fmt: skip
    batches = torch.utils.data.DataLoader(rows, batch_size=None)
    with job.timed():
        oneshot(model=model, dataset=batches, recipe=recipe, num_calibration_samples=len(rows))
        model.save_pretrained(job.artefact, save_compressed=algorithm != "sparsegpt")
    made = load_back(job)
    # AWQ changes norms too; scales and zero points, which stay beside decompressed weights, are no weights.
    job.keep({name: value for name, value in made.named_parameters() if name in names})
    job.check(made)
    return {"versions": versions("llmcompressor", "compressed-tensors", "torch", "transformers")}


def load_back(job: Job) -> torch.nn.Module:
    """The artefact as transformers reads it, decompressed."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    packed = {} if job.settings["algorithm"] == "sparsegpt" else {
        "quantization_config": CompressedTensorsConfig(run_compressed=False)}  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(job.artefact, dtype="auto", **packed).eval()


serve(work)
