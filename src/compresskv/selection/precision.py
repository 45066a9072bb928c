"""In how many bits what is kept is held: the names of the stores, and what they cost."""

from dataclasses import dataclass

from compresskv.system.check import check_known

NATIVE = "native"
RANGE_NBYTES = 4
"""Of each packed vector: its lowest number and the step between two codes, in 16 bits each."""


@dataclass(frozen=True)
class Precision:
    """Bits of each number of the keys and of the values that a cache keeps of a prompt."""

    name: str
    key_bits: int | None
    """None: as the model computes them."""
    value_bits: int | None
    summary: str
    """One line for users."""

    @property
    def is_packed(self) -> bool:
        """Whether anything is held in fewer bits than the model computes with."""
        return self.key_bits is not None

    def fits(self, head_dim: int) -> bool:
        """Whether a key's and a value's numbers fill whole bytes."""
        return all(bits is None or head_dim * bits % 8 == 0 for bits in (self.key_bits, self.value_bits))

    def nbytes(self, head_dim: int, itemsize: int) -> int:
        """What one token takes in one KV head, its ranges included.

        Args:
            head_dim: numbers of a key, and of a value.
            itemsize: bytes of a number of the model's own.
        """
        return sum(
            head_dim * itemsize if bits is None else head_dim * bits // 8 + RANGE_NBYTES
            for bits in (self.key_bits, self.value_bits)
        )

    def fixed_nbytes(self, head_dim: int, itemsize: int) -> int:
        """What one KV head takes beside `nbytes` of each of its tokens: means, divisors, and what its first token takes
        more than others, since that is not packed.
        """
        if not self.is_packed:
            return 0
        vectors = 2 * (self.key_bits != 8) + (self.value_bits != 8)
        whole = PRECISIONS[NATIVE].nbytes(head_dim, itemsize)
        return vectors * 2 * head_dim + whole - self.nbytes(head_dim, itemsize)


PRECISIONS = {
    one.name: one
    for one in (
        Precision(NATIVE, None, None, "as the model computes them"),
        Precision("int8", 8, 8, "8 bits a number"),
        Precision("int4k8", 8, 4, "keys in 8 bits, values in 4"),
        Precision("int4", 4, 4, "4 bits a number, two in a byte"),
        Precision("int2", 2, 2, "2 bits a number, four in a byte"),
    )
}
"""From the most bytes to the fewest."""


def find_precision(name: str) -> Precision:
    """A precision by its name.

    Raises:
        ConfigError: unknown.
    """
    check_known("store", name, PRECISIONS)
    return PRECISIONS[name]
