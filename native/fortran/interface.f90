! The C interface: the functions of include/septet.h with the names, arguments and error numbers that stand there
!
! Every function with bind(C) is here; arguments.f90 has the structures they take. Arguments are checked as pointers and sizes, and
! everything behind works on arrays. There are no instruction sets to choose from, and `threads` is only checked: this backend works
! in the caller's thread.
module septet_interface
  use, intrinsic :: iso_c_binding, only: c_associated, c_char, c_f_pointer, c_float, c_int, c_int8_t, c_int16_t, c_int32_t, &
                                         c_int64_t, c_loc, c_null_char, c_ptr
  use septet_activations, only: quantize, rotate, segment_count
  use septet_arguments, only: copy_weights, open_layer, open_rows, open_split, open_tiles, septet_activations_of
  use septet_checks, only: check_matrix, check_stream, is_block, no_memory, null_pointer, ok, wrong_block, wrong_code, &
                           wrong_group, wrong_range, wrong_size, wrong_threads
  use septet_codes, only: pack_tile, split_fields, tile_inputs, tile_outputs, tile_pairs, trellis_tile, unpack_tile, window_levels
  use septet_layers, only: code_split, code_trellis, dequantize, layer, linear, padded_inputs, &
                           padded_outputs, product_float, product_int8
  use septet_products, only: trellis_row_sums
  use septet_trellis_encoder, only: encode_tile
  implicit none
  private

  character(len=80, kind=c_char), target, save :: messages(0:15) = [character(len=80, kind=c_char) :: &
    "no error"//c_null_char, &
    "a pointer is NULL"//c_null_char, &
    "a size is out of range or contradicts another"//c_null_char, &
    "the bits per pair are not 6, 7 or 8 (split: 7)"//c_null_char, &
    "a rotation block is not a power of two that divides its axis"//c_null_char, &
    "a group is not a positive multiple of 4, or differs from the activation segment"//c_null_char, &
    "unknown code or kind of activations"//c_null_char, &
    "a symbol or an encoder input is out of range"//c_null_char, &
    "a number of threads is not positive"//c_null_char, &
    "no instruction set has this name"//c_null_char, &
    "this machine lacks the instruction set"//c_null_char, &
    "out of memory"//c_null_char, &
    "a model lacks a weight or a vector"//c_null_char, &
    "a token is not in the vocabulary"//c_null_char, &
    "the text does not fit the context"//c_null_char, &
    "unknown error number"//c_null_char]

contains

  function septet_error_message(error) result(message) bind(C)
    integer(c_int), value, intent(in) :: error
    type(c_ptr) :: message
    integer :: index
    index = ubound(messages, 1)
    if (error >= 0 .and. error < index) index = error
    message = c_loc(messages(index) (1:1))
  end function septet_error_message

  ! --- packed weights ----------------------------------------------------------------------------------------------------

  integer(c_int) function septet_pack(symbols, tiles, bits, packed) result(error) bind(C)
    type(c_ptr), value, intent(in) :: symbols, packed
    integer(c_int64_t), value, intent(in) :: tiles
    integer(c_int), value, intent(in) :: bits
    integer(c_int8_t), pointer, contiguous :: from(:, :), to(:, :)
    integer(c_int64_t) :: t
    error = check_stream(symbols, packed, tiles, bits)
    if (error /= ok .or. tiles == 0) return
    call c_f_pointer(symbols, from, [int(tile_pairs, c_int64_t), tiles])
    call c_f_pointer(packed, to, [16_c_int64_t * bits, tiles])
    error = wrong_range
    if (any(iand(int(from, c_int), 255) >= 2**bits)) return
    do concurrent (t = 1:tiles)
      call pack_tile(from(:, t), bits, to(:, t))
    end do
    error = ok
  end function septet_pack

  integer(c_int) function septet_unpack(packed, tiles, bits, symbols) result(error) bind(C)
    type(c_ptr), value, intent(in) :: packed, symbols
    integer(c_int64_t), value, intent(in) :: tiles
    integer(c_int), value, intent(in) :: bits
    integer(c_int8_t), pointer, contiguous :: from(:, :), to(:, :)
    integer(c_int64_t) :: t
    error = check_stream(packed, symbols, tiles, bits)
    if (error /= ok .or. tiles == 0) return
    call c_f_pointer(packed, from, [16_c_int64_t * bits, tiles])
    call c_f_pointer(symbols, to, [int(tile_pairs, c_int64_t), tiles])
    do concurrent (t = 1:tiles)
      call unpack_tile(from(:, t), bits, to(:, t))
    end do
  end function septet_unpack

  integer(c_int) function septet_trellis_encode(fixed, tiles, bits, symbols, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: fixed, symbols
    integer(c_int64_t), value, intent(in) :: tiles
    integer(c_int), value, intent(in) :: bits, threads
    integer(c_int8_t), allocatable :: levels(:, :)
    integer(c_int32_t) :: w
    error = check_stream(fixed, symbols, tiles, bits)
    if (error /= ok) return
    allocate (levels(2, 0:65535))
    do concurrent (w = 0:65535)
      levels(:, w) = window_levels(w, bits)
    end do
    error = search(levels, fixed, tiles, bits, symbols, threads)
  end function septet_trellis_encode

  integer(c_int) function septet_trellis_search(levels, fixed, tiles, bits, symbols, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: levels, fixed, symbols
    integer(c_int64_t), value, intent(in) :: tiles
    integer(c_int), value, intent(in) :: bits, threads
    integer(c_int8_t), pointer, contiguous :: chosen(:, :)
    error = check_stream(fixed, symbols, tiles, bits)
    if (error == ok .and. .not. c_associated(levels)) error = null_pointer
    if (error /= ok) return
    call c_f_pointer(levels, chosen, [2, 65536])
    error = wrong_range
    if (any(chosen < -127_c_int8_t)) return
    error = search(chosen, fixed, tiles, bits, symbols, threads)
  end function septet_trellis_search

  !> The symbols whose levels come closest to `fixed`
  integer(c_int) function search(levels, fixed, tiles, bits, symbols, threads) result(error)
    integer(c_int8_t), intent(in) :: levels(2, 0:65535)
    type(c_ptr), intent(in) :: fixed, symbols
    integer(c_int64_t), intent(in) :: tiles
    integer(c_int), intent(in) :: bits, threads
    integer(c_int16_t), pointer, contiguous :: from(:, :, :)
    integer(c_int8_t), pointer, contiguous :: to(:, :)
    integer :: found(tile_pairs)
    integer(c_int64_t) :: t
    error = merge(wrong_threads, ok, threads < 0)
    if (error /= ok .or. tiles == 0) return
    call c_f_pointer(fixed, from, [2_c_int64_t, int(tile_pairs, c_int64_t), tiles])
    call c_f_pointer(symbols, to, [int(tile_pairs, c_int64_t), tiles])
    error = wrong_range
    if (any(from < -1020_c_int16_t .or. from > 1020_c_int16_t)) return
    do t = 1, tiles
      call encode_tile(from(:, :, t), levels, bits, found)
      to(:, t) = int(found - merge(256, 0, found > 127), c_int8_t)
    end do
    error = ok
  end function search

  integer(c_int) function septet_trellis_levels(tiles, levels, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: tiles, levels
    integer(c_int), value, intent(in) :: threads
    error = decode(tiles, levels, threads, code_trellis)
  end function septet_trellis_levels

  integer(c_int) function septet_split_fields(tiles, fields, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: tiles, fields
    integer(c_int), value, intent(in) :: threads
    error = decode(tiles, fields, threads, code_split)
  end function septet_split_fields

  integer(c_int) function decode(tiles, values, threads, code) result(error)
    type(c_ptr), intent(in) :: tiles, values
    integer(c_int), intent(in) :: threads
    integer, intent(in) :: code
    integer(c_int8_t), pointer, contiguous :: packed(:, :, :), matrix(:, :)
    integer(c_int8_t) :: tile(tile_outputs, tile_inputs)
    integer(c_int64_t) :: r, t
    integer(c_int) :: bits
    call open_tiles(tiles, code, packed, bits, error)
    if (error == ok .and. .not. c_associated(values)) error = null_pointer
    if (error == ok .and. threads < 0) error = wrong_threads
    if (error /= ok) return
    call c_f_pointer(values, matrix, [tile_inputs * size(packed, 2, c_int64_t), tile_outputs * size(packed, 3, c_int64_t)])
    do r = 0, size(packed, 3) - 1
      do t = 0, size(packed, 2) - 1
        if (code == code_trellis) then
          call trellis_tile(packed(:, t + 1, r + 1), bits, tile)
        else
          call split_fields(packed(:, t + 1, r + 1), tile)
        end if
        matrix(tile_inputs * t + 1:tile_inputs * (t + 1), tile_outputs * r + 1:tile_outputs * (r + 1)) = transpose(tile)
      end do
    end do
  end function decode

  ! --- activations -------------------------------------------------------------------------------------------------------

  integer(c_int) function septet_hadamard(x, tokens, features, block, y) result(error) bind(C)
    type(c_ptr), value, intent(in) :: x, y
    integer(c_int64_t), value, intent(in) :: tokens, features, block
    real(c_float), pointer, contiguous :: from(:, :), to(:, :)
    integer(c_int64_t) :: m
    error = check_matrix(x, y, tokens, features)
    if (error == ok .and. .not. is_block(block, features)) error = wrong_block
    if (error /= ok .or. tokens == 0 .or. features == 0) return
    call c_f_pointer(x, from, [features, tokens])
    call c_f_pointer(y, to, [features, tokens])
    do m = 1, tokens
      to(:, m) = from(:, m)
      call rotate(to(:, m), block)
    end do
  end function septet_hadamard

  integer(c_int) function septet_quantize_activations(x, tokens, features, segment, values, scales) result(error) bind(C)
    type(c_ptr), value, intent(in) :: x, values, scales
    integer(c_int64_t), value, intent(in) :: tokens, features, segment
    real(c_float), pointer, contiguous :: from(:, :), factors(:, :)
    integer(c_int8_t), pointer, contiguous :: to(:, :)
    integer(c_int64_t) :: m
    error = check_matrix(x, values, tokens, features)
    if (error == ok .and. tokens > 0 .and. .not. c_associated(scales)) error = null_pointer
    if (error == ok .and. segment < 1) error = wrong_size
    if (error /= ok .or. tokens == 0 .or. features == 0) return
    call c_f_pointer(x, from, [features, tokens])
    call c_f_pointer(values, to, [features, tokens])
    call c_f_pointer(scales, factors, [segment_count(features, segment), tokens])
    do concurrent (m = 1:tokens)
      call quantize(from(:, m), segment, to(:, m), factors(:, m))
    end do
  end function septet_quantize_activations

  ! --- products ----------------------------------------------------------------------------------------------------------

  integer(c_int) function septet_trellis_accumulate(tiles, values, tokens, sums, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: tiles, values, sums
    integer(c_int64_t), value, intent(in) :: tokens
    integer(c_int), value, intent(in) :: threads
    integer(c_int8_t), pointer, contiguous :: packed(:, :, :), x(:, :)
    integer(c_int32_t), pointer, contiguous :: totals(:, :)
    integer(c_int64_t) :: rows
    integer(c_int) :: bits
    integer(c_int64_t) :: r
    call open_tiles(tiles, code_trellis, packed, bits, error)
    if (error == ok) error = check_matrix(values, sums, tokens, tile_inputs * size(packed, 2, c_int64_t))
    if (error == ok .and. threads < 0) error = wrong_threads
    if (error /= ok .or. tokens == 0) return
    rows = size(packed, 3, c_int64_t)
    call c_f_pointer(values, x, [tile_inputs * size(packed, 2, c_int64_t), tokens])
    call c_f_pointer(sums, totals, [tile_outputs * rows, tokens])
    do concurrent (r = 1:rows)
      call trellis_row_sums(packed(:, :, r), bits, x, totals(tile_outputs * (r - 1) + 1:tile_outputs * r, :))
    end do
  end function septet_trellis_accumulate

  integer(c_int) function septet_trellis_product(tiles, x, y, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: tiles, x, y
    integer(c_int), value, intent(in) :: threads
    type(layer) :: l
    l%code = code_trellis
    call open_tiles(tiles, l%code, l%weight, l%bits, error)
    if (error /= ok) return
    l%inputs = tile_inputs * size(l%weight, 2, c_int64_t)
    l%outputs = tile_outputs * size(l%weight, 3, c_int64_t)
    error = multiply(l, x, y, threads)
  end function septet_trellis_product

  integer(c_int) function septet_trellis_product_float(tiles, x, tokens, y, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: tiles, x, y
    integer(c_int64_t), value, intent(in) :: tokens
    integer(c_int), value, intent(in) :: threads
    type(layer) :: l
    l%code = code_trellis
    call open_tiles(tiles, l%code, l%weight, l%bits, error)
    if (error /= ok) return
    l%inputs = tile_inputs * size(l%weight, 2, c_int64_t)
    l%outputs = tile_outputs * size(l%weight, 3, c_int64_t)
    error = multiply_float(l, x, tokens, y, threads)
  end function septet_trellis_product_float

  integer(c_int) function septet_split_product(tiles, scales, x, out_features, y, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: tiles, scales, x, y
    integer(c_int64_t), value, intent(in) :: out_features
    integer(c_int), value, intent(in) :: threads
    type(layer) :: l
    type(septet_activations_of), pointer :: activations
    call open_split(tiles, scales, out_features, l, error)
    if (error == ok .and. .not. c_associated(x)) error = null_pointer
    if (error /= ok) return
    call c_f_pointer(x, activations)
    if (activations%segment /= l%segment) error = wrong_group
    if (error == ok) error = multiply(l, x, y, threads)
  end function septet_split_product

  integer(c_int) function septet_split_product_float(tiles, scales, x, tokens, out_features, y, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: tiles, scales, x, y
    integer(c_int64_t), value, intent(in) :: tokens, out_features
    integer(c_int), value, intent(in) :: threads
    type(layer) :: l
    call open_split(tiles, scales, out_features, l, error)
    if (error == ok) error = multiply_float(l, x, tokens, y, threads)
  end function septet_split_product_float

  integer(c_int) function septet_int8_product(weight, x, y, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: weight, x, y
    integer(c_int), value, intent(in) :: threads
    type(layer) :: l
    type(septet_activations_of), pointer :: activations
    call open_rows(weight, l, error)
    if (error == ok .and. .not. c_associated(x)) error = null_pointer
    if (error /= ok) return
    call c_f_pointer(x, activations)
    if (activations%segment < l%inputs) error = wrong_size
    if (error == ok) error = multiply(l, x, y, threads)
  end function septet_int8_product

  integer(c_int) function septet_int8_product_float(weight, x, tokens, y, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: weight, x, y
    integer(c_int64_t), value, intent(in) :: tokens
    integer(c_int), value, intent(in) :: threads
    type(layer) :: l
    call open_rows(weight, l, error)
    if (error == ok) error = multiply_float(l, x, tokens, y, threads)
  end function septet_int8_product_float

  !> y = the product of a layer with quantized activations, without what the layer does before and after
  integer(c_int) function multiply(l, x, y, threads) result(error)
    type(layer), intent(inout) :: l
    type(c_ptr), intent(in) :: x, y
    integer(c_int), intent(in) :: threads
    type(septet_activations_of), pointer :: activations
    integer(c_int8_t), pointer, contiguous :: values(:, :)
    real(c_float), pointer, contiguous :: scales(:, :), products(:, :)
    real(c_float), allocatable :: padded(:, :)
    integer :: status
    error = wrong_threads
    if (threads < 0) return
    error = null_pointer
    if (.not. c_associated(x)) return
    call c_f_pointer(x, activations)
    error = check_matrix(activations%values, y, activations%tokens, padded_inputs(l))
    if (error == ok .and. activations%segment < 1) error = wrong_size
    if (error == ok .and. activations%tokens > 0 .and. .not. c_associated(activations%scales)) error = null_pointer
    if (error /= ok .or. activations%tokens == 0) return
    l%segment = min(activations%segment, padded_inputs(l))
    call c_f_pointer(activations%values, values, [padded_inputs(l), activations%tokens])
    call c_f_pointer(activations%scales, scales, [segment_count(padded_inputs(l), l%segment), activations%tokens])
    call c_f_pointer(y, products, [l%outputs, activations%tokens])
    if (padded_outputs(l) == l%outputs) then
      call product_int8(l, values, scales, products)
      return
    end if
    allocate (padded(padded_outputs(l), activations%tokens), stat=status)
    error = no_memory
    if (status /= 0) return
    call product_int8(l, values, scales, padded)
    products = padded(:l%outputs, :)
    error = ok
  end function multiply

  integer(c_int) function multiply_float(l, x, tokens, y, threads) result(error)
    type(layer), intent(in) :: l
    type(c_ptr), intent(in) :: x, y
    integer(c_int64_t), intent(in) :: tokens
    integer(c_int), intent(in) :: threads
    real(c_float), pointer, contiguous :: values(:, :), products(:, :)
    real(c_float), allocatable :: padded(:, :)
    integer :: status
    error = check_matrix(x, y, tokens, max(padded_inputs(l), l%outputs))
    if (error == ok .and. threads < 0) error = wrong_threads
    if (error /= ok .or. tokens == 0) return
    call c_f_pointer(x, values, [padded_inputs(l), tokens])
    call c_f_pointer(y, products, [l%outputs, tokens])
    allocate (padded(padded_outputs(l), tokens), stat=status)
    error = no_memory
    if (status /= 0) return
    call product_float(l, values, padded)
    products = padded(:l%outputs, :)
    error = ok
  end function multiply_float

  ! --- a whole layer -----------------------------------------------------------------------------------------------------

  integer(c_int) function septet_arrange(stored, weight) result(error) bind(C)
    type(c_ptr), value, intent(in) :: stored, weight
    call copy_weights(stored, weight, error)
  end function septet_arrange

  integer(c_int) function septet_linear(stored, x, tokens, activations, y, threads) result(error) bind(C)
    type(c_ptr), value, intent(in) :: stored, x, y
    integer(c_int64_t), value, intent(in) :: tokens
    integer(c_int), value, intent(in) :: activations, threads
    type(layer) :: l
    real(c_float), pointer, contiguous :: from(:, :), to(:, :)
    logical :: failed
    call open_layer(stored, l, error)
    if (error == ok) error = check_matrix(x, y, tokens, max(padded_inputs(l), l%outputs))
    if (error == ok .and. activations /= 0 .and. activations /= 1) error = wrong_code
    if (error == ok .and. threads < 0) error = wrong_threads
    if (error /= ok .or. tokens == 0) return
    call c_f_pointer(x, from, [l%inputs, tokens])
    call c_f_pointer(y, to, [l%outputs, tokens])
    call linear(l, from, activations == 1, to, failed)
    if (failed) error = no_memory
  end function septet_linear

  !> Weights float32 [N, K] of a layer; not in septet.h, whose callers never need them
  integer(c_int) function septet_dequantize(stored, weights) result(error) bind(C)
    type(c_ptr), value, intent(in) :: stored, weights
    type(layer) :: l
    real(c_float), pointer, contiguous :: to(:, :)
    call open_layer(stored, l, error)
    if (error == ok .and. .not. c_associated(weights)) error = null_pointer
    if (error /= ok) return
    call c_f_pointer(weights, to, [l%inputs, l%outputs])
    call dequantize(l, to)
  end function septet_dequantize
end module septet_interface
