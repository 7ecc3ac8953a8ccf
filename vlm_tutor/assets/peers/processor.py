"""Qwen2-VL's processor for images only, which loads where torchvision does not; a folder says the rest."""
from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


class ImageText(Qwen2VLProcessor):
    "`Qwen2VLProcessor` without its video half"
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = '<|image_pad|>', '<|video_pad|>'
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def load_processor(job):
    "The processor of a job's model; larger images are shrunk to the job's limit"
    tokenizer = AutoTokenizer.from_pretrained(job['model'])
    images = Qwen2VLImageProcessorPil.from_pretrained(job['model'])
    images.size = dict(shortest_edge=images.size['shortest_edge'], longest_edge=job['image_max_pixels'])
    return ImageText(images, tokenizer, chat_template=tokenizer.chat_template)
