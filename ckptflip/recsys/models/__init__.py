"""Recommendation models in PyTorch, every one called with dense features and ids, giving one logit per row.

- `configurations`: the sizes and recipes of DLRM's reference runs, a small one, and the study's dummy model.
- `dlrm`: DLRM; `fields`: what the other models share; `factorisation`: FM, DeepFM, AFM; `crossing`:
  Wide&Deep, DCN v1 and v2.

All tables are `torch.nn.EmbeddingBag` of mode ``sum`` under the names ``emb_l.N.weight``. Importing this
package imports no framework.
"""
