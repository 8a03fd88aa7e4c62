! The codes of SPEC.md sections 1 to 3: symbols, windows, levels and fields of one tile of 64 outputs x 4 inputs
!
! A tile is a stream of 128 pairs of `bits` bits each; pair p = 2*o + j holds inputs 2*j and 2*j + 1 of output o. Bytes arrive as
! int8, because Fortran has no unsigned integers; `octet` gives them back their values 0 .. 255.
module septet_codes
  use, intrinsic :: iso_c_binding, only: c_int8_t, c_int16_t, c_int32_t, c_int64_t
  use septet_tables, only: level_table, multipliers
  implicit none
  private
  public :: pack_tile, unpack_tile, stream_of, window_levels, trellis_tile, split_words, in_order, split_fields
  public :: tile_outputs, tile_inputs, tile_pairs, tail_bytes, chunk

  !> chunk: how many tiles are decoded at a time
  integer, parameter :: tile_outputs = 64, tile_inputs = 4, tile_pairs = 128, chunk = 8
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
    eight_bytes = ior(iand(int(four_bytes(bytes, 0), c_int64_t), 4294967295_c_int64_t), &
                      shiftl(int(four_bytes(bytes, 4), c_int64_t), 32))
  end function eight_bytes

  !> Bytes `offset` to `offset` + 3 of a run of bytes as one number
  pure integer(c_int32_t) function four_bytes(bytes, offset)
    integer(c_int8_t), intent(in) :: bytes(0:*)
    integer, intent(in) :: offset
    four_bytes = ior(ior(octet(bytes(offset)), ishft(octet(bytes(offset + 1)), 8)), ishft(octet(bytes(offset + 2)), 16))
    four_bytes = ior(four_bytes, ishft(octet(bytes(offset + 3)), 24))
  end function four_bytes

  !> Tiles of code "split": the lower 14 bits of words(h, j, t) are the fields of output 2*h + j - 3 of tile t (outputs 0 .. 63)
  !
  ! Two outputs take 28 bits, so eight such halves fill seven pieces of 32 bits: half q = 0 .. 7 begins in the piece before piece q
  ! and ends in piece q. Every step is a plain vector operation, with the two outputs of a half in two vectors; `in_order` puts the
  ! sums of all outputs in line again.
  pure subroutine split_words(tiles, bytes, words)
    integer, intent(in) :: tiles
    integer(c_int8_t), intent(in) :: bytes(112 * tiles)
    integer(c_int16_t), intent(out) :: words(tile_outputs / 2, 2, tiles)
    integer(c_int32_t) :: pieces(0:28 * chunk + 1), halves(0:7, 0:4 * chunk - 1)
    integer :: i, g, q
    pieces(0) = 0
    pieces(1) = four_bytes(bytes, 0)
    do i = 1, 28 * tiles - 1  ! offset 1: gfortran makes one load of four only where none begins the run
      pieces(i + 1) = four_bytes(bytes(4 * i), 1)
    end do
    pieces(28 * tiles + 1) = 0
    do g = 0, 4 * tiles - 1
      !dir$ nounroll
      !GCC$ unroll 1
      do q = 0, 7
        halves(q, g) = ior(shiftr(shiftr(pieces(7 * g + q), 1), 31 - 4 * q), shiftl(pieces(7 * g + q + 1), 4 * q))
      end do
    end do
    call cut_words(tiles, halves, words)
  end subroutine split_words

  pure subroutine cut_words(tiles, halves, words)
    integer, intent(in) :: tiles
    integer(c_int32_t), intent(in) :: halves(tile_outputs / 2, tiles)
    integer(c_int16_t), intent(out) :: words(tile_outputs / 2, 2, tiles)
    integer :: h, t
    do t = 1, tiles
      do h = 1, tile_outputs / 2
        words(h, 1, t) = int(halves(h, t), c_int16_t)
        words(h, 2, t) = int(shiftr(halves(h, t), 14), c_int16_t)
      end do
    end do
  end subroutine cut_words

  !> Sums of 64 outputs as `split_words` arranges them, output by output
  pure function in_order(sums) result(ordered)
    integer(c_int32_t), intent(in) :: sums(tile_outputs / 2, 2)
    integer(c_int32_t) :: ordered(tile_outputs)
    ordered = reshape(transpose(sums), [tile_outputs])
  end function in_order

  !> Fields of a tile of code "split", outputs fastest: 0 .. 15 for inputs 0 and 2, 0 .. 7 for inputs 1 and 3
  pure subroutine split_fields(tile, fields)
    integer(c_int8_t), intent(in) :: tile(112)
    integer(c_int8_t), intent(out) :: fields(tile_outputs, tile_inputs)
    integer(c_int16_t) :: arranged(tile_outputs / 2, 2, 1), words(tile_outputs)
    call split_words(1, tile, arranged)
    words = reshape(transpose(arranged(:, :, 1)), [tile_outputs])
    fields(:, 1) = int(ibits(words, 0, 4), c_int8_t)
    fields(:, 2) = int(ibits(words, 4, 3), c_int8_t)
    fields(:, 3) = int(ibits(words, 7, 4), c_int8_t)
    fields(:, 4) = int(ibits(words, 11, 3), c_int8_t)
  end subroutine split_fields
end module septet_codes
