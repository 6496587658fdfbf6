"""What a judge that ships knows of people it has not seen.

    hyperdb render_heads identities=3000 views=6 photo_views=4 out=data/heads_train
    python experiments/embedded/judges/measure.py judge=clip data=data/heads_train        # or judge=vicreg
    hyperdb render_heads identities=7000 views=6 photo_views=4 out=data/heads_7000
    python experiments/embedded/judges/measure.py judge=verifier held_out=500 data=data/heads_7000
    hyperdb render_heads split=validation identities=100 views=8 out=data/heads_validation
    python experiments/embedded/judges/measure.py judge=prompts split=validation held_out=100 data=data/heads_validation

The words are settings of `hyperdb train_judge`; data and held_out must be those of its training, of which the judge has
not seen the last people, or the people those of another split. Writes NAME.json beside this file; out=FILE writes
elsewhere, path=FOLDER (of judge=prompts a file) measures another judge.
"""

from __future__ import annotations

from pathlib import Path

from hyperdb import config
from hyperdb.data.people import latent_moments, load_people
from hyperdb.metrics import judge as load_judge
from hyperdb.metrics.obedience import Judge
from hyperdb.metrics.objectives.unseen import measured, split
from hyperdb.metrics.pretrained import WEIGHTS
from hyperdb.runtime.errors import UserError, run_script
from hyperdb.runtime.files import hash_files, load_tensors, save_json
from hyperdb.runtime.paths import resolve
from hyperdb.runtime.provenance import provenance


def main(words: list[str]) -> None:
    """Measure one judge, write its file."""
    own = dict(word.partition("=")[::2] for word in words if word.startswith(("out=", "path=", "split=")))
    settings = config.load("train_judge", [word for word in words if word.partition("=")[0] not in own])
    name, _, _ = settings.judge.kind.partition(".")
    split_of = own.get("split", "train")
    base, people = settings.diffusion.load(), load_people(settings.data, split=split_of, size=settings.diffusion.size)
    classifier = name == "prompts"
    path = own.get("path", "package:embedded/judge.safetensors" if classifier else f"package:embedded/judges/{name}")
    file = resolve(path) if classifier else resolve(path) / WEIGHTS
    judge = Judge.load(file) if classifier else load_judge(name, path, base.device)
    metadata = load_tensors(file)[1]
    if (made_of := metadata.get("data")) != people.digest and split_of == "train":
        raise UserError(f"{settings.data} is not what {path} has learned from: digest {people.digest}, not {made_of}")
    seen, held = split(people, settings.held_out)
    objective = settings.judge.objective(people, seen, base)
    found = measured(objective, judge, base, latent_moments(base, people), held)
    told = {"people_held_out": settings.held_out, "pictures_held_out": len(held), "steps": int(metadata["steps"])}
    made_from = {"weights": hash_files([file]), "data": people.digest, "base": base.digest}
    out = Path(own.get("out", Path(__file__).with_name(f"{name}.json")))
    print(save_json(out, {**told, **found, **made_from, **provenance()}))


if __name__ == "__main__":
    run_script(main)
