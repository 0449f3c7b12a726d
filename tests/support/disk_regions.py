"""Where the parts of an entry's header stand in its file, for those who change one byte of each."""

from dgcache_core.aead import TAG_BYTES
from dgcache_core.disk_format import MIN_HEADER_BYTES, PREFIX_BYTES
from dgcache_core.tier_keys import MAC_BYTES

SEAL = MIN_HEADER_BYTES
FIRST_CHUNK = SEAL + TAG_BYTES

HEADER_REGIONS = {
    "magic": 0,
    "version": 5,
    "flags": 7,
    "header length": 11,
    "key id": 12,
    "generation id": 20,
    "nonce": 28,
    "encrypted header, first byte": PREFIX_BYTES,
    "encrypted header, middle": MIN_HEADER_BYTES // 2,
    "encrypted header, tag": MIN_HEADER_BYTES - MAC_BYTES - 1,
    "MAC, first byte": MIN_HEADER_BYTES - MAC_BYTES,
    "MAC, last byte": MIN_HEADER_BYTES - 1,
    "seal, first byte": SEAL,
    "seal, last byte": FIRST_CHUNK - 1,
}
