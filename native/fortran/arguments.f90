! What the pointers of the C interface stand for: the structures of include/septet.h, checked and turned into arrays
module septet_arguments
  use, intrinsic :: iso_c_binding, only: c_associated, c_f_pointer, c_int, c_int8_t, c_int64_t, c_ptr
  use septet_activations, only: segment_count
  use septet_checks, only: check_sizes, fits, is_block, null_pointer, ok, wrong_block, wrong_code, wrong_group, wrong_size
  use septet_codes, only: tile_inputs, tile_outputs
  use septet_layers, only: code_int8, code_split, code_trellis, layer, padded_inputs
  implicit none
  private
  public :: septet_activations_of, open_tiles, open_split, open_rows, open_layer, copy_weights

  type, bind(C) :: septet_tiles
    type(c_ptr) :: packed
    integer(c_int64_t) :: rows, columns
    integer(c_int) :: bits
  end type septet_tiles

  type, bind(C) :: septet_activations_of
    type(c_ptr) :: values, scales
    integer(c_int64_t) :: tokens, segment
  end type septet_activations_of

  type, bind(C) :: septet_split_scales
    type(c_ptr) :: scale, offset
    integer(c_int64_t) :: group_size
  end type septet_split_scales

  type, bind(C) :: septet_rows
    type(c_ptr) :: weight, scale
    integer(c_int64_t) :: rows, features
  end type septet_rows

  type, bind(C) :: septet_layer
    integer(c_int) :: code, bits
    integer(c_int64_t) :: in_features, out_features
    type(c_ptr) :: weight, scale, offset, input_scale
    integer(c_int64_t) :: input_block, output_block, group_size, segment
    type(c_ptr) :: arranged_for
  end type septet_layer

contains

  subroutine open_tiles(pointer, code, packed, bits, error)
    type(c_ptr), intent(in) :: pointer
    integer, intent(in) :: code
    integer(c_int8_t), pointer, contiguous, intent(out) :: packed(:, :, :)
    integer(c_int), intent(out) :: bits, error
    type(septet_tiles), pointer :: tiles
    packed => null()
    bits = 0
    error = null_pointer
    if (.not. c_associated(pointer)) return
    call c_f_pointer(pointer, tiles)
    if (.not. c_associated(tiles%packed)) return
    bits = tiles%bits
    error = wrong_size
    if (tiles%columns > 2**28 .or. .not. fits(tiles%rows, 64_c_int64_t)) return
    error = check_sizes(code, bits, tile_inputs * tiles%columns, tile_outputs * tiles%rows)
    if (error == ok) call c_f_pointer(tiles%packed, packed, [16_c_int64_t * bits, tiles%columns, tiles%rows])
  end subroutine open_tiles

  subroutine open_split(tiles, pointer, out_features, l, error)
    type(c_ptr), intent(in) :: tiles, pointer
    integer(c_int64_t), intent(in) :: out_features
    type(layer), intent(out) :: l
    integer(c_int), intent(out) :: error
    type(septet_split_scales), pointer :: scales
    l%code = code_split
    call open_tiles(tiles, code_split, l%weight, l%bits, error)
    if (error == ok .and. .not. c_associated(pointer)) error = null_pointer
    if (error /= ok) return
    call c_f_pointer(pointer, scales)
    l%inputs = tile_inputs * size(l%weight, 2, c_int64_t)
    l%outputs = out_features
    if (out_features > tile_outputs * size(l%weight, 3, c_int64_t) .or. &
        out_features <= tile_outputs * (size(l%weight, 3, c_int64_t) - 1)) error = wrong_size
    if (error == ok) call open_scales(scales%scale, scales%offset, scales%group_size, l, error)
  end subroutine open_split

  subroutine open_scales(scale, offset, group_size, l, error)
    type(c_ptr), intent(in) :: scale, offset
    integer(c_int64_t), intent(in) :: group_size
    type(layer), intent(inout) :: l
    integer(c_int), intent(out) :: error
    integer(c_int64_t) :: shape(2)
    error = wrong_group
    if (group_size < 1 .or. mod(group_size, int(tile_inputs, c_int64_t)) /= 0) return
    error = null_pointer
    if (.not. c_associated(scale)) return
    error = ok
    l%segment = group_size
    shape = [tile_outputs * size(l%weight, 3, c_int64_t), 2 * segment_count(padded_inputs(l), group_size)]
    call c_f_pointer(scale, l%scale, shape)
    if (c_associated(offset)) call c_f_pointer(offset, l%offset, shape)
  end subroutine open_scales

  subroutine open_rows(pointer, l, error)
    type(c_ptr), intent(in) :: pointer
    type(layer), intent(out) :: l
    integer(c_int), intent(out) :: error
    type(septet_rows), pointer :: rows
    error = null_pointer
    if (.not. c_associated(pointer)) return
    call c_f_pointer(pointer, rows)
    if (.not. (c_associated(rows%weight) .and. c_associated(rows%scale))) return
    l%code = code_int8
    l%inputs = rows%features
    l%outputs = rows%rows
    l%segment = rows%features
    error = check_sizes(l%code, l%bits, l%inputs, l%outputs)
    if (error /= ok) return
    call c_f_pointer(rows%weight, l%weight, [l%inputs, l%outputs, 1_c_int64_t])
    call c_f_pointer(rows%scale, l%scale, [l%outputs, 1_c_int64_t])
  end subroutine open_rows

  subroutine open_layer(pointer, l, error)
    type(c_ptr), intent(in) :: pointer
    type(layer), intent(out) :: l
    integer(c_int), intent(out) :: error
    type(septet_layer), pointer :: stored
    integer(c_int64_t) :: group
    error = null_pointer
    if (.not. c_associated(pointer)) return
    call c_f_pointer(pointer, stored)
    l%code = stored%code
    l%bits = stored%bits
    l%inputs = stored%in_features
    l%outputs = stored%out_features
    l%input_block = stored%input_block
    l%output_block = stored%output_block
    if (.not. (c_associated(stored%weight) .and. c_associated(stored%scale))) return
    error = check_sizes(l%code, l%bits, l%inputs, l%outputs)
    ! there is no other order here, so another library has arranged them
    if (error == ok .and. c_associated(stored%arranged_for)) error = wrong_code
    if (error /= ok) return
    if (.not. is_block(l%input_block, l%inputs)) error = wrong_block
    if (l%code == code_trellis .and. .not. is_block(l%output_block, l%outputs)) error = wrong_block
    if (error /= ok) return
    l%segment = padded_inputs(l)
    if (l%code == code_int8) then
      call c_f_pointer(stored%weight, l%weight, [l%inputs, l%outputs, 1_c_int64_t])
    else
      call c_f_pointer(stored%weight, l%weight, [16_c_int64_t * l%bits, padded_inputs(l) / tile_inputs, &
                                                 (l%outputs + tile_outputs - 1) / tile_outputs])
    end if
    if (c_associated(stored%input_scale)) call c_f_pointer(stored%input_scale, l%input_scale, [l%inputs])
    if (l%code == code_split) then
      group = merge(padded_inputs(l), stored%group_size, stored%group_size == 0)
      call open_scales(stored%scale, stored%offset, group, l, error)
    else
      if (l%code == code_trellis .and. stored%segment < 0) error = wrong_size
      if (l%code == code_trellis .and. stored%segment > 0) l%segment = min(stored%segment, padded_inputs(l))
      call c_f_pointer(stored%scale, l%scale, [l%outputs, 1_c_int64_t])
    end if
  end subroutine open_layer

  !> Copies the weights of a layer and makes it point to the copy
  subroutine copy_weights(pointer, weight, error)
    type(c_ptr), intent(in) :: pointer, weight
    integer(c_int), intent(out) :: error
    type(layer) :: l
    type(septet_layer), pointer :: stored
    integer(c_int8_t), pointer, contiguous :: to(:, :, :)
    call open_layer(pointer, l, error)
    if (error == ok .and. .not. c_associated(weight)) error = null_pointer
    if (error /= ok) return
    call c_f_pointer(weight, to, shape(l%weight, c_int64_t))
    to = l%weight
    call c_f_pointer(pointer, stored)
    stored%weight = weight
  end subroutine copy_weights
end module septet_arguments
