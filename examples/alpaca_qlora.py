"""The usual QLoRA tutorial, on fastjax.

Not as usual are the import lines and `overwrite=True`, without which a folder that
exists is never replaced.

    python examples/alpaca_qlora.py [MODEL] [DATA] [STEPS]

MODEL is a hub name, a preset or a folder; DATA a jsonl file of the columns instruction,
input and output. Results go to `lora_model/` and `model/` in the current folder.
"""

import sys

from datasets import load_dataset
from transformers import TextStreamer

from fastjax import (
    FastLanguageModel,
    SFTTrainer,
    TrainingArguments,
    is_bfloat16_supported,
)

options = dict(enumerate(sys.argv))
model_name = options.get(1, "meta-llama/Meta-Llama-3-8B")
data_file = options.get(2, "examples/data/alpaca_small.jsonl")
max_steps = int(options.get(3, 60))
max_seq_length = 2048
dtype = None  # None asks the device: bfloat16, or float16 on older GPUs
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=model_name,
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=[
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
model.print_trainable_parameters()

alpaca_prompt = """Below is an instruction that describes a task, paired with an input \
that provides further context. Write a response that appropriately completes the \
request.

### Instruction:
{}

### Input:
{}

### Response:
{}"""

EOS_TOKEN = tokenizer.eos_token


def formatting_prompts_func(examples):
    """Returns the column `text`: each row in the prompt, with the end of text."""
    rows = zip(
        examples["instruction"], examples["input"], examples["output"], strict=True
    )
    return {"text": [alpaca_prompt.format(*row) + EOS_TOKEN for row in rows]}


dataset = load_dataset("json", data_files=data_file, split="train")
dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=2,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=min(5, max_steps),
        max_steps=max_steps,
        learning_rate=2e-4,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=10,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']:.1f} seconds used for training")

FastLanguageModel.for_inference(model)
question = alpaca_prompt.format("Continue the sequence.", "1, 1, 2, 3, 5, 8", "")

inputs = tokenizer([question], return_tensors="pt").to("cuda")
outputs = model.generate(**inputs, max_new_tokens=64, use_cache=True)
print(tokenizer.batch_decode(outputs)[0])

text_streamer = TextStreamer(tokenizer)
_ = model.generate(**inputs, streamer=text_streamer, max_new_tokens=64)

model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
model.save_pretrained_merged(
    "model", tokenizer, save_method="merged_16bit", overwrite=True
)
