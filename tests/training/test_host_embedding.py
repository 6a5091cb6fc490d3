"""Token embeddings in host memory: the same values, and nothing of them on the GPU."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.training.host_embedding import HostEmbedding, keep_embeddings_on_host

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def model_of(device, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).requires_grad_(False).to(device)


def test_embeddings_stay_where_they_would_be_missed():
    assert not keep_embeddings_on_host(model_of("cpu"))
    assert type(model_of("cpu").get_input_embeddings()) is torch.nn.Embedding


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_a_model_computes_the_same(device):
    model, ids = model_of(device), torch.arange(77, device=device).mul(13).remainder(100).view(7, 11)
    expected, rows = model(input_ids=ids).logits, model.get_input_embeddings()(ids)
    weight = model.get_input_embeddings().weight
    assert keep_embeddings_on_host(model)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, HostEmbedding) and embeddings.weight.is_pinned()
    assert all(parameter.data_ptr() != weight.data_ptr() for parameter in model.parameters())
    assert torch.equal(embeddings(ids), rows) and torch.equal(model(input_ids=ids).logits, expected)
    assert model.device.type == "cuda"  # who asks a model for its device is told where its layers are
    assert not keep_embeddings_on_host(model_of(device, tied=True))
    assert not keep_embeddings_on_host(model_of(device).requires_grad_())
