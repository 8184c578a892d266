"""What published denoisers would take, counted on the meta device: the table of docs/models.md.

python bench/published_memory.py     # two minutes
"""

import torch

import ptqd

NAMES = (
    *("ddpm-cifar10-32", "ldm-celebahq-256", "dit-xl-2-256", "pixart-sigma-1024", "sd-1.5", "lcm-dreamshaper"),
    *("stable-video", "sana-1600m-1024", "cogvideox-2b", "sd3-medium", "sdxl", "flux.1-dev"),
)
RECIPES = ("w8a8", "w4a8", "w4a8-gptq")


def main() -> None:
    print("| name | parameters | in bfloat16 | recipe | on disk | in memory | a call | quantizing |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for name in NAMES:
        full = ptqd.count_cost(name, dtype=torch.bfloat16)
        for recipe in RECIPES:
            cost = ptqd.count_cost(name, recipe, dtype=torch.bfloat16)
            memory = cost.memory
            sizes = (memory.disk, memory.resident, memory.calling, memory.quantizing)
            cells = [f"{size / 1e9:.2f}" if size >= 1e7 else f"{size / 1e9:.3f}" for size in sizes]
            first = (f"`{name}`", f"{full.parameters / 1e6:,.0f} M", f"{full.disk / 1e9:.2f}")
            head = first if recipe == RECIPES[0] else ("", "", "")
            print(f"| {' | '.join((*head, recipe, *cells))} |", flush=True)


if __name__ == "__main__":
    main()
