! From a septet checkpoint to matrices: packed layers as config.json describes them, dense ones where nothing was quantized
module septet_checkpoint
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int64_t
  use septet_activations, only: rotate, segment_count
  use septet_failure, only: fail
  use septet_json, only: exists, integer_of, is_true, member, span, text_of, whole
  use septet_layers, only: code_int8, code_split, code_trellis, layer, linear, padded_inputs, padded_outputs
  use septet_tensor_file, only: has_tensor, open_tensors, read_bytes, read_floats, tensor_file, text
  implicit none
  private
  public :: checkpoint, matrix, open_checkpoint, read_matrix, read_vector, apply, row_of

  type :: checkpoint
    type(tensor_file) :: file
    type(span) :: layers
    logical :: block_scales = .false., float_activations = .false.
  end type checkpoint

  !> A linear layer, packed or dense (inputs x outputs)
  type :: matrix
    type(layer) :: packed
    real(c_float), pointer, contiguous :: dense(:, :) => null()
    logical :: float_activations = .false.
  end type matrix

contains

  subroutine open_checkpoint(directory, c)
    character(len=*), intent(in) :: directory
    type(checkpoint), intent(out) :: c
    type(span) :: quantization
    integer(c_int64_t) :: version
    call open_tensors(directory, c%file)
    associate (config => c%file%config)
      quantization = member(config, whole(config), "quantization_config")
      if (text_of(config, member(config, quantization, "quant_method")) /= "septet") &
        call fail("config.json must be that of a septet checkpoint", "another one", "run septet quantize first")
      version = integer_of(config, member(config, quantization, "format_version"), -1_c_int64_t)
      if (version /= 0) call fail("format_version must be 0", text(version), "use a program of that version")
      c%layers = member(config, quantization, "layers")
      c%block_scales = text_of(config, member(config, quantization, "activation_scale")) == "block"
      c%float_activations = text_of(config, member(config, quantization, "activations")) == "float"
    end associate
  end subroutine open_checkpoint

  !> A norm's weights
  function read_vector(c, name, size) result(values)
    type(checkpoint), intent(in) :: c
    character(len=*), intent(in) :: name
    integer(c_int64_t), intent(in) :: size
    real(c_float), allocatable :: values(:)
    values = read_floats(c%file, name//".weight", [size])
  end function read_vector

  !> A linear layer or an embedding of these sizes
  function read_matrix(c, name, inputs, outputs) result(m)
    type(checkpoint), intent(in) :: c
    character(len=*), intent(in) :: name
    integer(c_int64_t), intent(in) :: inputs, outputs
    type(matrix) :: m
    type(span) :: entry
    m%float_activations = c%float_activations
    entry = member(c%file%config, c%layers, name)
    if (has_tensor(c%file, name//".bias")) call fail(name//" must have no bias", "one", "this program runs LLaMA models only")
    if (exists(entry)) then
      call read_layer(c, name, entry, m%packed)
      if (m%packed%inputs /= inputs .or. m%packed%outputs /= outputs) &
        call fail(name//" must be "//text(outputs)//" x "//text(inputs), &
                  text(m%packed%outputs)//" x "//text(m%packed%inputs), "fetch the checkpoint again")
    else
      allocate (m%dense(inputs, outputs))
      m%dense = reshape(read_floats(c%file, name//".weight", [inputs, outputs]), [inputs, outputs])
    end if
  end function read_matrix

  subroutine read_layer(c, name, entry, l)
    type(checkpoint), intent(in) :: c
    character(len=*), intent(in) :: name
    type(span), intent(in) :: entry
    type(layer), intent(out) :: l
    integer(c_int8_t), pointer, contiguous :: bytes(:)
    integer(c_int64_t) :: group
    l%inputs = number(c, entry, "in_features", 0_c_int64_t)
    l%outputs = number(c, entry, "out_features", 0_c_int64_t)
    l%bits = int(number(c, entry, "bits_per_pair", 0_c_int64_t))
    l%input_block = number(c, entry, "input_block", 1_c_int64_t)
    l%output_block = number(c, entry, "output_block", 1_c_int64_t)
    select case (text_of(c%file%config, member(c%file%config, entry, "code")))
    case ("trellis")
      l%code = code_trellis
    case ("split")
      l%code = code_split
    case ("int8")
      l%code = code_int8
    case default
      call fail("the code of "//name//" must be trellis, split or int8", "another one", "use a newer program")
    end select
    call check_layer(name, l)
    group = number(c, entry, "group_size", padded_inputs(l))
    l%segment = padded_inputs(l)
    if (l%code == code_trellis .and. c%block_scales) l%segment = l%input_block
    if (l%code == code_split) l%segment = group
    if (group < 1 .or. mod(group, 4_c_int64_t) /= 0 .and. l%code == code_split) &
      call fail("group_size of "//name//" must be a multiple of 4", text(group), "fetch the checkpoint again")
    if (l%code == code_int8) then
      bytes => read_bytes(c%file, name//".weight", "I8", [l%inputs, l%outputs])
      l%weight(1:l%inputs, 1:l%outputs, 1:1) => bytes
    else
      bytes => read_bytes(c%file, name//".weight", "U8", [4_c_int64_t * l%bits * padded_inputs(l), padded_outputs(l) / 64])
      l%weight(1:16 * l%bits, 1:padded_inputs(l) / 4, 1:padded_outputs(l) / 64) => bytes
    end if
    call read_scales(c, name, l)
  end subroutine read_layer

  subroutine check_layer(name, l)
    character(len=*), intent(in) :: name
    type(layer), intent(in) :: l
    logical :: fits
    fits = l%inputs >= 1 .and. l%inputs <= 66311 .and. l%outputs >= 1 .and. l%outputs < 2_c_int64_t**31
    if (l%code == code_trellis) fits = fits .and. l%bits >= 6 .and. l%bits <= 8
    if (l%code == code_split) fits = fits .and. l%bits == 7
    if (fits) fits = is_block(l%input_block, l%inputs) .and. is_block(l%output_block, l%outputs)
    if (.not. fits) call fail("the sizes of "//name//" in config.json must be possible", &
                              text(l%outputs)//" x "//text(l%inputs), "fetch the checkpoint again")
  end subroutine check_layer

  elemental logical function is_block(block, features)
    integer(c_int64_t), intent(in) :: block, features
    is_block = block >= 1
    if (is_block) is_block = iand(block, block - 1) == 0 .and. mod(features, block) == 0
  end function is_block

  subroutine read_scales(c, name, l)
    type(checkpoint), intent(in) :: c
    character(len=*), intent(in) :: name
    type(layer), intent(inout) :: l
    logical :: symmetric
    if (l%code == code_split) then
      symmetric = .not. has_tensor(c%file, name//".weight_offset")
      l%scale => split_scales(c, name//".weight_scale", l)
      if (.not. symmetric) l%offset => split_scales(c, name//".weight_offset", l)
    else
      allocate (l%scale(l%outputs, 1), l%input_scale(l%inputs))
      l%scale(:, 1) = read_floats(c%file, name//".weight_scale", [l%outputs])
      l%input_scale = read_floats(c%file, name//".weight_input_scale", [l%inputs])
    end if
  end subroutine read_scales

  !> float16 [N or 1, 2 G] as the products want it: 64 * rows x 2 G
  function split_scales(c, name, l) result(scales)
    type(checkpoint), intent(in) :: c
    character(len=*), intent(in) :: name
    type(layer), intent(in) :: l
    real(c_float), pointer, contiguous :: scales(:, :)
    real(c_float), allocatable :: stored(:)
    integer(c_int64_t) :: columns, rows
    columns = 2 * segment_count(padded_inputs(l), l%segment)
    rows = l%outputs
    if (one_row(c, name)) rows = 1
    stored = read_floats(c%file, name, [columns, rows])
    allocate (scales(padded_outputs(l), columns))
    scales = 0
    if (rows == 1) then
      scales = spread(stored, 1, int(padded_outputs(l)))
    else
      scales(:rows, :) = transpose(reshape(stored, [columns, rows]))
    end if
  end function split_scales

  logical function one_row(c, name)
    type(checkpoint), intent(in) :: c
    character(len=*), intent(in) :: name
    associate (header => c%file%header)
      associate (shape => member(header, member(header, whole(header), name), "shape"))
        one_row = .false.
        if (exists(shape)) one_row = header(shape%first:shape%first + 2) == "[1,"
      end associate
    end associate
  end function one_row

  integer(c_int64_t) function number(c, entry, name, otherwise)
    type(checkpoint), intent(in) :: c
    type(span), intent(in) :: entry
    character(len=*), intent(in) :: name
    integer(c_int64_t), intent(in) :: otherwise
    number = integer_of(c%file%config, member(c%file%config, entry, name), otherwise)
  end function number

  !> y(:, t) = W x(:, t) for every token t
  subroutine apply(m, x, y)
    type(matrix), intent(in) :: m
    real(c_float), intent(in), contiguous :: x(:, :)
    real(c_float), intent(out), contiguous :: y(:, :)
    logical :: failed
    integer :: n, t
    if (associated(m%dense)) then
      do concurrent (t = 1:size(x, 2), n = 1:size(y, 1))
        y(n, t) = dot_product(m%dense(:, n), x(:, t))
      end do
      return
    end if
    call linear(m%packed, x, m%float_activations, y, failed)
    if (failed) call fail("there must be memory for a layer's activations", "none", "use a shorter prompt")
  end subroutine apply

  !> Row `index` (from 0) of an embedding
  function row_of(m, index) result(row)
    type(matrix), intent(in) :: m
    integer, intent(in) :: index
    real(c_float), allocatable :: row(:)
    if (associated(m%dense)) then
      row = m%dense(:, index + 1)
    else
      row = m%packed%scale(index + 1, 1) * real(m%packed%weight(:, index + 1, 1), c_float)
      call rotate(row, m%packed%input_block)
      row = m%packed%input_scale * row
    end if
  end function row_of
end module septet_checkpoint
