"""Intel's AutoRound: rounding learned by signed gradients. Settings: `scheme`, `group`, `iters`, `symmetric`."""

import torch
from protocol import Job, layers, load, serve, versions


def work(job: Job) -> dict[str, object]:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    settings = dict(job.settings)
    rows = torch.from_numpy(job.rows())
    # It leaves out the rows that are shorter than seqlen.
    more = {"nsamples": len(rows), "seqlen": rows.shape[1], "batch_size": 8, "iters": settings.pop("iters", 200)}
    if group := settings.pop("group", None):
        more["group_size"] = group
    if (symmetric := settings.pop("symmetric", None)) is not None:
        more["sym"] = symmetric
    model = load(job)
    tuner = AutoRound(model, AutoTokenizer.from_pretrained(job.model), scheme=settings.pop("scheme"),
                      dataset=list(rows.split(8)), device_map="cpu", enable_torch_compile=False, **more,
                      **settings)  # fmt: skip
    with job.timed():
        made, _ = tuner.quantize()
        # Its packed layers have no product on every CPU; until they are packed, the weights are what will be packed.
        weights = {f"{name}.weight": module.weight.detach().clone() for name, module in layers(made).items()}
        tuner.save_quantized(str(job.artefact), format="auto_round", inplace=True)
    job.keep(weights)
    result: dict[str, object] = {"versions": versions("auto-round", "torch", "transformers")}
    try:
        from transformers import AutoModelForCausalLM

        job.check(AutoModelForCausalLM.from_pretrained(job.artefact, dtype="auto", device_map="cpu").eval())
    except Exception as error:  # what the artefact is does not hang on whether it runs here
        result["note"] = f"its own forward pass: {type(error).__name__}: {str(error)[:200]}"
    return result


serve(work)
