"""Stage 1, multimodal pretraining: the static mapping learns to put pictures into the language model's words.

CLIP and the language model stay frozen; W_a, b_a and t_img train on the caption that follows `<img>`. The defaults are
the paper's recipe. CLIP ViT-L/14 and OPT-IML-1.3B on a GPU, pairs of your own (docs/own-data.md):

    python examples/run_pretrain.py \
        --vision_model_name_or_path openai/clip-vit-large-patch14 \
        --language_model_name_or_path facebook/opt-iml-1.3b \
        --num_dynamic_tokens 1 --dtype bfloat16 --bf16 --dataloader_num_workers 8 \
        --dataset_name_or_path pairs.jsonl \
        --output_dir outputs/opt-pretrain

The digits world, on any machine: the other two backbones, a small interaction, small batches, larger steps:

    python examples/digits/scenes.py --output_dir outputs/scenes --num_scenes 12000
    python examples/run_pretrain.py \
        --vision_model_name_or_path examples/digits/backbones/clip \
        --language_model_name_or_path examples/digits/backbones/language_model \
        --interaction cross_attention --config_overrides \
        '{"interaction_hidden_size": 192, "interaction_num_layers": 3, "interaction_num_heads": 4}' \
        --dataset_name_or_path outputs/scenes/captions.jsonl \
        --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --learning_rate 3e-3 \
        --output_dir outputs/digits-pretrain

`output_dir` then holds the IPN, megabytes, the processor, and the learning curve. A run that was stopped goes on with
`--resume_from_checkpoint last`. Next: run_instruct.py.
"""

from transformers import HfArgumentParser

from transformers_lmeye.training import (
    LMEyeTrainer,
    ModelArguments,
    PairCollator,
    PairDataArguments,
    StageTrainingArguments,
    load_model,
    train_and_save,
)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, PairDataArguments, StageTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    model, processor = load_model(model_args, training_args.seed)
    num_trained = model.freeze_for_stage("pretrain")
    if training_args.should_log:
        print(f"Stage 1 trains {num_trained:,} of {model.num_parameters():,} parameters.")

    features = data_args.open_features(model, processor, stage="pretrain")
    trainer = LMEyeTrainer(
        model,
        training_args,
        data_collator=PairCollator(processor, data_args.max_length, skip_bad_samples=True),
        train_dataset=data_args.train_dataset(training_args.seed, features),
        eval_dataset=data_args.eval_dataset(features),
        processing_class=processor,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    main()
