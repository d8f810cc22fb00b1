"""A small GPT-2 with Hugging Face's Trainer, guarded by one line. ``--ill``: a learning rate far too high. Nothing is downloaded.

pip install lossguard[transformers]
python examples/transformers_trainer.py
python examples/transformers_trainer.py --ill
"""

import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from lossguard import TrainingHalted
from lossguard.integrations.transformers import LossGuardCallback

VOCABULARY, LENGTH = 31, 12


def sequences(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Counting in threes from a random start: each token follows from the one before."""
    start = torch.randint(VOCABULARY, (n, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in (start + 3 * torch.arange(LENGTH)) % VOCABULARY]


def main(ill: bool) -> None:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    guard = LossGuardCallback()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=16, max_steps=100, learning_rate=1.0 if ill else 3e-3, eval_strategy="steps", eval_steps=25,
            save_strategy="no", logging_steps=25, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=sequences(512, 0), eval_dataset=sequences(64, 1), callbacks=[guard])
        try:
            trainer.train()
            print(f"evaluation loss {trainer.evaluate()['eval_loss']:.3f}")
        except TrainingHalted as halt:
            print(f"halted at step {halt.finding.step}")
    print(*(guard.findings or ["no findings"]), sep="\n")


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
