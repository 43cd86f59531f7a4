"""An adapter that lists what it holds, as the one for S3 does, three entries to a page."""

from lmcache.v1.distributed.api import EncodedObjectKey, KeyEntry, KeyListPage
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig


class PagingAdapterConfig(FSL2AdapterConfig):
    pass


class PagingAdapter(FSL2Adapter):
    def __init__(self, config, l1_memory_desc):
        super().__init__(config)

    def list_l2_keys(self, model_name=None, page_size=500, cursor=None):
        start = int(cursor or 0)
        files = sorted(self._base_path.glob(f"{model_name}@*.data"))
        entries = []
        for file in files[start : start + 3]:
            model, _, _, key, salt = file.name.removesuffix(".data").split("@")
            entries.append(KeyEntry(EncodedObjectKey(key, model, 0, cache_salt=salt), 0))
        end = start + 3
        return KeyListPage(tuple(entries), str(end) if end < len(files) else None)
