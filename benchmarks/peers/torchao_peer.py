"""torchao, weights alone. Settings: `config`, one of its classes, `bits`, `group`, and the qparams `algorithm`.

On a CPU its low bits stay in bytes; what they would take is counted: codes of `bits`, a bf16 scale a group (or row),
and a zero point of `bits` where there is one.
"""

import torch
from protocol import Job, layers, load, serve, versions


def work(job: Job) -> dict[str, object]:
    from torchao import quantization as ao

    bits, group = job.settings["bits"], job.settings.get("group", 0)
    name, algorithm = job.settings["config"], job.settings.get("algorithm")
    zeros = False
    if name == "IntxWeightOnlyConfig":
        from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

        more = {"intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm[algorithm]} if algorithm else {}
        config = ao.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), ao.PerGroup(group) if group else ao.PerAxis(0),
                                         scale_dtype=torch.bfloat16, **more)  # fmt: skip
    elif name == "Int4WeightOnlyConfig":
        config, zeros = ao.Int4WeightOnlyConfig(group_size=group), True
    else:
        config = ao.Int8WeightOnlyConfig()
    model = load(job)
    with job.timed():
        ao.quantize_(model, config, lambda _, name: name != "lm_head" and isinstance(_, torch.nn.Linear))
        size = 0
        for module in layers(model).values():
            groups = module.weight.shape[0] * (module.weight.shape[1] // group if group else 1)
            size += module.weight.numel() * bits // 8 + groups * 2 + (groups * bits // 8 if zeros else 0)
    job.keep({f"{name}.weight": module.weight.dequantize() for name, module in layers(model).items()})
    job.check(model)
    return {"versions": versions("torchao", "torch", "transformers"), "linear_bytes": size}


serve(work)
