"""Stage 2, multimodal instruction following: the language model learns to ask the picture and to read its answer.

CLIP, the language model and the static mapping of stage 1 stay frozen; the rest of the IPN trains on answers. The
defaults are the paper's recipe: batch 256 on one device. CLIP ViT-L/14 and OPT-IML-1.3B on a GPU, after their stage 1,
on LLaVA's conversations as they are published, or your own (docs/own-data.md):

    python examples/run_instruct.py \
        --model_name_or_path outputs/opt-pretrain \
        --dtype bfloat16 --bf16 --dataloader_num_workers 8 \
        --dataset_name_or_path llava_instruct_150k.json --image_folder coco/train2017 \
        --output_dir outputs/opt-instruct

The digits world, after its stage 1:

    python examples/run_instruct.py \
        --model_name_or_path outputs/digits-pretrain \
        --dataset_name_or_path outputs/scenes/conversations.jsonl \
        --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --learning_rate 1e-3 \
        --output_dir outputs/digits-instruct

Captions as conversations: `--instruction "Describe the picture." --answer_column caption`. A run that was stopped goes
on with `--resume_from_checkpoint last`.
"""

from transformers import HfArgumentParser

from transformers_lmeye.training import (
    ConversationCollator,
    ConversationDataArguments,
    LMEyeTrainer,
    ModelArguments,
    StageTrainingArguments,
    StageTwoArguments,
    collect_requests,
    load_model,
    standardize_requests,
    train_and_save,
)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, ConversationDataArguments, StageTrainingArguments, StageTwoArguments))
    model_args, data_args, training_args, stage_args = parser.parse_args_into_dataclasses()

    model, processor = load_model(model_args, training_args.seed)
    num_trained = model.freeze_for_stage("pretrain" if stage_args.train_static_mapping else "instruct")
    if training_args.should_log:
        print(f"Stage 2 trains {num_trained:,} of {model.num_parameters():,} parameters.")

    features = data_args.open_features(model, processor)
    train_dataset = data_args.train_dataset(training_args.seed, features)
    collator = ConversationCollator(processor, data_args.max_length, skip_bad_samples=True)
    if stage_args.standardize_requests and not training_args.resume_from_checkpoint:
        requests = collect_requests(model, collator, train_dataset, stage_args.standardize_requests)
        standardize_requests(model.ipn, requests)
    trainer = LMEyeTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=data_args.eval_dataset(features),
        processing_class=processor,
    )
    train_and_save(trainer)


if __name__ == "__main__":
    main()
