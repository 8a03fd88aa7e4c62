! The codes of SPEC.md sections 1 to 3: symbols, windows, levels and fields of one tile of 64 outputs x 4 inputs
!
! A tile is a stream of 128 pairs of `bits` bits each; pair p = 2*o + j holds inputs 2*j and 2*j + 1 of output o. Bytes arrive as
! int8, because Fortran has no unsigned integers; `octet` gives them back their values 0 .. 255.
module septet_codes
  use, intrinsic :: iso_c_binding, only: c_int8_t, c_int16_t, c_int32_t, c_int64_t
  use septet_tables, only: level_table, multipliers
  implicit none
  private
  public :: pack_tile, unpack_tile, stream_of, window_levels, trellis_tile, split_tile, split_fields
  public :: tile_outputs, tile_inputs, tile_pairs, tail_bytes

  integer, parameter :: tile_outputs = 64, tile_inputs = 4, tile_pairs = 128
  !> A stream is followed by its own first bytes: windows wrap around, and every load of eight bytes stays inside
  integer, parameter :: tail_bytes = 8
  integer(c_int32_t), parameter :: wide_table(0:127) = level_table

contains

  elemental integer(c_int32_t) function octet(byte)
    integer(c_int8_t), intent(in) :: byte
    octet = iand(int(byte, c_int32_t), 255_c_int32_t)
  end function octet

  !> The tile with its first bytes once more at its end
  pure function stream_of(tile) result(stream)
    integer(c_int8_t), intent(in) :: tile(:)
    integer(c_int8_t) :: stream(0:size(tile) + tail_bytes - 1)
    stream(0:size(tile) - 1) = tile
    stream(size(tile):) = tile(1:tail_bytes)
  end function stream_of

  !> The 16 bits of a stream that begin at bit `position`
  pure integer(c_int32_t) function window_at(stream, position)
    integer(c_int8_t), intent(in) :: stream(0:)
    integer, intent(in) :: position
    integer(c_int32_t) :: wide
    integer :: first
    first = position / 8
    wide = octet(stream(first)) + 256 * octet(stream(first + 1)) + 65536 * octet(stream(first + 2))
    window_at = ibits(wide, mod(position, 8), 16)
  end function window_at

  !> Bytes of 128 symbols below 2**bits
  pure subroutine pack_tile(symbols, bits, tile)
    integer(c_int8_t), intent(in) :: symbols(0:tile_pairs - 1)
    integer, intent(in) :: bits
    integer(c_int8_t), intent(out) :: tile(0:16 * bits - 1)
    integer :: p, first, wide
    tile = 0_c_int8_t
    do p = 0, tile_pairs - 1
      first = bits * p / 8
      wide = ishft(octet(symbols(p)), mod(bits * p, 8))
      tile(first) = ior(tile(first), int8_of(iand(wide, 255)))
      if (wide > 255) tile(first + 1) = int8_of(ishft(wide, -8))
    end do
  end subroutine pack_tile

  !> The int8 with the bits of 0 .. 255
  elemental integer(c_int8_t) function int8_of(value)
    integer, intent(in) :: value
    int8_of = int(value - 256 * (value / 128), c_int8_t)
  end function int8_of

  !> Symbols of a tile
  pure subroutine unpack_tile(tile, bits, symbols)
    integer, intent(in) :: bits
    integer(c_int8_t), intent(in) :: tile(16 * bits)
    integer(c_int8_t), intent(out) :: symbols(0:tile_pairs - 1)
    integer(c_int8_t) :: stream(0:16 * bits + tail_bytes - 1)
    integer :: p
    stream = stream_of(tile)
    do concurrent (p = 0:tile_pairs - 1)
      symbols(p) = int8_of(ibits(window_at(stream, bits * p), 0, bits))
    end do
  end subroutine unpack_tile

  !> Both levels of a window: bits 16 .. 31 of a product choose two entries of one table
  pure function window_levels(window, bits) result(levels)
    integer(c_int32_t), intent(in) :: window
    integer, intent(in) :: bits
    integer(c_int8_t) :: levels(2)
    integer(c_int32_t) :: hash
    hash = int(ibits(window * multipliers(bits), 16, 16), c_int32_t)
    levels = [level_table(ibits(hash, 0, 7)), level_table(ibits(hash, 8, 7))]
  end function window_levels

  !> Levels of a tile of code "trellis", outputs fastest
  !
  ! Eight bytes hold the windows of the four pairs of two outputs. A table of 32-bit numbers suits vector look-ups.
  pure subroutine trellis_tile(tile, bits, levels)
    integer, intent(in) :: bits
    integer(c_int8_t), intent(in) :: tile(16 * bits)
    integer(c_int8_t), intent(out) :: levels(0:tile_outputs - 1, 0:tile_inputs - 1)
    integer(c_int8_t) :: stream(0:16 * bits + tail_bytes - 1)
    integer(c_int64_t) :: eight, multiplier
    integer(c_int32_t) :: hashes(0:tile_outputs - 1, 0:1)
    integer :: g, o, j
    stream = stream_of(tile)
    multiplier = multipliers(bits)
    do g = 0, tile_outputs / 2 - 1
      o = 2 * g
      eight = shiftr(eight_bytes(stream(bits * g / 2:bits * g / 2 + 7)), mod(4 * bits * g, 8))
      hashes(o, 0) = int(ibits(ibits(eight, 0, 16) * multiplier, 16, 16), c_int32_t)
      hashes(o, 1) = int(ibits(ibits(eight, bits, 16) * multiplier, 16, 16), c_int32_t)
      hashes(o + 1, 0) = int(ibits(ibits(eight, 2 * bits, 16) * multiplier, 16, 16), c_int32_t)
      hashes(o + 1, 1) = int(ibits(ibits(eight, 3 * bits, 16) * multiplier, 16, 16), c_int32_t)
    end do
    do concurrent (j = 0:1, o = 0:tile_outputs - 1)
      levels(o, 2 * j) = int(wide_table(ibits(hashes(o, j), 0, 7)), c_int8_t)
      levels(o, 2 * j + 1) = int(wide_table(ibits(hashes(o, j), 8, 7)), c_int8_t)
    end do
  end subroutine trellis_tile

  pure integer(c_int64_t) function eight_bytes(bytes)
    integer(c_int8_t), intent(in) :: bytes(8)
    eight_bytes = ior(iand(int(four_bytes(bytes(:4)), c_int64_t), 4294967295_c_int64_t), &
                      shiftl(int(four_bytes(bytes(5:)), c_int64_t), 32))
  end function eight_bytes

  !> The two symbols of every output of a tile of code "split" in one number: 4, 3, 4 and 3 bits for its four inputs
  !
  ! Four outputs take 56 bits = 7 bytes of the eight that are loaded; the later ones one byte early, so that no load leaves the tile.
  pure subroutine split_tile(tile, words)
    integer(c_int8_t), intent(in) :: tile(0:111)
    integer(c_int16_t), intent(out) :: words(0:tile_outputs - 1)
    integer(c_int64_t) :: four(0:15)
    integer :: q, r
    do q = 0, 7
      four(q) = eight_bytes(tile(7 * q:7 * q + 7))
    end do
    do q = 8, 15
      four(q) = shiftr(eight_bytes(tile(7 * q - 1:7 * q + 6)), 8)
    end do
    do concurrent (q = 0:15, r = 0:3)
      words(4 * q + r) = int(ibits(four(q), 14 * r, 14), c_int16_t)
    end do
  end subroutine split_tile

  pure integer(c_int32_t) function four_bytes(bytes)
    integer(c_int8_t), intent(in) :: bytes(4)
    four_bytes = ior(ior(octet(bytes(1)), ishft(octet(bytes(2)), 8)), ishft(octet(bytes(3)), 16))
    four_bytes = ior(four_bytes, ishft(octet(bytes(4)), 24))
  end function four_bytes

  !> Fields of a tile of code "split", outputs fastest: 0 .. 15 for inputs 0 and 2, 0 .. 7 for inputs 1 and 3
  pure subroutine split_fields(tile, fields)
    integer(c_int8_t), intent(in) :: tile(112)
    integer(c_int8_t), intent(out) :: fields(tile_outputs, tile_inputs)
    integer(c_int16_t) :: words(tile_outputs)
    call split_tile(tile, words)
    fields(:, 1) = int(ibits(words, 0, 4), c_int8_t)
    fields(:, 2) = int(ibits(words, 4, 3), c_int8_t)
    fields(:, 3) = int(ibits(words, 7, 4), c_int8_t)
    fields(:, 4) = int(ibits(words, 11, 3), c_int8_t)
  end subroutine split_fields
end module septet_codes
