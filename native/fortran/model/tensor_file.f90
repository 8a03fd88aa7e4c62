! Tensors of a safetensors file that nobody vouches for: sizes, types and CRC-32 are checked before a byte is used
module septet_tensor_file
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int32_t, c_int64_t
  use septet_failure, only: fail
  use septet_json, only: element, exists, integer_of, member, span, text_of, whole
  implicit none
  private
  public :: tensor_file, open_tensors, read_bytes, read_floats, has_tensor, crc32, float16, read_text, text

  !> An open file: `header` is its JSON, data begin at position `origin`
  type :: tensor_file
    integer :: unit = -1
    integer(c_int64_t) :: origin = 0, data_size = 0
    character(len=:), allocatable :: header
    !> config.json, and where its checksums are
    character(len=:), allocatable :: config
    type(span) :: checksums
  end type tensor_file

  integer(c_int64_t), parameter :: largest_header = 2_c_int64_t**27

contains

  !> An integer as text
  pure function text(number) result(string)
    integer(c_int64_t), intent(in) :: number
    character(len=:), allocatable :: string
    character(len=24) :: buffer
    write (buffer, '(i0)') number
    string = trim(buffer)
  end function text

  !> A whole file
  function read_text(path) result(content)
    character(len=*), intent(in) :: path
    character(len=:), allocatable :: content
    integer(c_int64_t) :: size
    integer :: unit, status
    open (newunit=unit, file=path, access="stream", form="unformatted", action="read", status="old", iostat=status)
    if (status /= 0) call fail("a model directory must have "//path, "no such file", "name a directory that septet quantize wrote")
    inquire (unit, size=size)
    if (size > largest_header) call fail(path//" must be at most 128 MiB", text(size)//" bytes", "this is no such file")
    allocate (character(len=size) :: content)
    read (unit, iostat=status) content
    if (status /= 0) call fail(path//" must be readable", "an error while reading", "check the disk")
    close (unit)
  end function read_text

  subroutine open_tensors(directory, file)
    character(len=*), intent(in) :: directory
    type(tensor_file), intent(out) :: file
    integer(c_int64_t) :: length, size
    integer :: status
    file%config = read_text(directory//"/config.json")
    file%checksums = member(file%config, member(file%config, whole(file%config), "quantization_config"), "crc32")
    open (newunit=file%unit, file=directory//"/model.safetensors", access="stream", form="unformatted", action="read", &
          status="old", iostat=status)
    if (status /= 0) call fail("the weights must be in one file, model.safetensors", "none in "//directory, &
                               "this program does not read sharded checkpoints")
    inquire (file%unit, size=size)
    length = -1
    read (file%unit, iostat=status) length
    if (status /= 0 .or. length < 2 .or. length > min(largest_header, size - 8)) &
      call fail("a safetensors header must fit its file", text(length)//" bytes of "//text(size), "fetch the file again")
    allocate (character(len=length) :: file%header)
    read (file%unit, iostat=status) file%header
    if (status /= 0) call fail("a safetensors header must be readable", "an error while reading", "fetch the file again")
    file%origin = 8 + length
    file%data_size = size - file%origin
  end subroutine open_tensors

  logical function has_tensor(file, name)
    type(tensor_file), intent(in) :: file
    character(len=*), intent(in) :: name
    has_tensor = exists(member(file%header, whole(file%header), name))
  end function has_tensor

  !> The bytes of a tensor of a type ("U8", "F16", ...) and a shape, its last axis first; CRC-32 compared
  function read_bytes(file, name, kinds, shape) result(bytes)
    type(tensor_file), intent(in) :: file
    character(len=*), intent(in) :: name, kinds
    integer(c_int64_t), intent(in) :: shape(:)
    integer(c_int8_t), pointer, contiguous :: bytes(:)
    type(span) :: entry
    integer(c_int64_t) :: first, last, size, width
    integer :: i, axes, status
    character(len=8) :: checksum
    entry = member(file%header, whole(file%header), name)
    if (.not. exists(entry)) call fail("the checkpoint must have "//name, "no such tensor", "this program runs LLaMA models only")
    width = element_width(text_of(file%header, member(file%header, entry, "dtype")), kinds)
    if (width == 0) call fail(name//" must be "//kinds, text_of(file%header, member(file%header, entry, "dtype")), &
                              "quantize the model again")
    axes = 0
    size = width
    do i = 1, ubound(shape, 1)
      if (shape(i) < 1 .or. shape(i) > 2_c_int64_t**40 / size) &
        call fail(name//" must fit memory", text(shape(i)), "check config.json")
      size = size * shape(i)
      if (integer_of(file%header, element(file%header, member(file%header, entry, "shape"), ubound(shape, 1) + 1 - i), &
                     -1_c_int64_t) == shape(i)) axes = axes + 1
    end do
    if (axes /= ubound(shape, 1) .or. exists(element(file%header, member(file%header, entry, "shape"), axes + 1))) &
      call fail("the shape of "//name//" must be what config.json says", &
                file%header(entry%first:min(entry%last, entry%first + 80)), "fetch the checkpoint again")
    first = integer_of(file%header, element(file%header, member(file%header, entry, "data_offsets"), 1), -1_c_int64_t)
    last = integer_of(file%header, element(file%header, member(file%header, entry, "data_offsets"), 2), -1_c_int64_t)
    if (first < 0 .or. last > file%data_size .or. last - first /= size) &
      call fail("the bytes of "//name//" must lie in the file", text(first)//" to "//text(last), "fetch the file again")
    allocate (bytes(size), stat=status)
    if (status /= 0) call fail("there must be memory for "//name, text(size)//" bytes", "close other programs")
    read (file%unit, pos=file%origin + first + 1, iostat=status) bytes
    if (status /= 0) call fail(name//" must be readable", "an error while reading", "check the disk")
    write (checksum, '(z8.8)') crc32(bytes)
    if (lowercase(checksum) /= text_of(file%config, member(file%config, file%checksums, name))) &
      call fail("the CRC-32 of "//name//" must be what config.json says", lowercase(checksum), "fetch the file again")
  end function read_bytes

  !> A tensor of F32, F16 or BF16 as float32
  function read_floats(file, name, shape) result(values)
    type(tensor_file), intent(in) :: file
    character(len=*), intent(in) :: name
    integer(c_int64_t), intent(in) :: shape(:)
    real(c_float), allocatable :: values(:)
    integer(c_int8_t), pointer, contiguous :: bytes(:)
    character(len=:), allocatable :: kind
    integer(c_int64_t) :: count, i
    bytes => read_bytes(file, name, "F32 F16 BF16", shape)
    kind = text_of(file%header, member(file%header, member(file%header, whole(file%header), name), "dtype"))
    count = product(shape)
    allocate (values(count))
    do concurrent (i = 1:count)
      select case (kind)
      case ("F32")
        values(i) = transfer(octets(bytes(4 * i - 3:4 * i)), 0.0_c_float)
      case ("F16")
        values(i) = float16(octets(bytes(2 * i - 1:2 * i)))
      case default
        values(i) = transfer(ishft(octets(bytes(2 * i - 1:2 * i)), 16), 0.0_c_float)
      end select
    end do
    deallocate (bytes)
  end function read_floats

  !> Bytes, lowest first, as one number
  pure integer(c_int32_t) function octets(bytes)
    integer(c_int8_t), intent(in) :: bytes(:)
    integer :: i
    octets = 0
    do i = 1, size(bytes)
      octets = ior(octets, ishft(iand(int(bytes(i), c_int32_t), 255_c_int32_t), 8 * (i - 1)))
    end do
  end function octets

  !> The number with the bits of an IEEE half
  elemental real(c_float) function float16(bits)
    integer(c_int32_t), intent(in) :: bits
    integer(c_int32_t) :: exponent
    exponent = ibits(bits, 10, 5)
    if (exponent == 0) then
      float16 = real(ibits(bits, 0, 10), c_float) * 2.0_c_float**(-24)
    else
      float16 = transfer(ior(ishft(merge(255, exponent + 112, exponent == 31), 23), ishft(ibits(bits, 0, 10), 13)), 0.0_c_float)
    end if
    if (btest(bits, 15)) float16 = -float16
  end function float16

  !> Bytes of an element, 0 when the type is none of those allowed
  pure integer(c_int64_t) function element_width(kind, kinds)
    character(len=*), intent(in) :: kind, kinds
    element_width = 0
    if (len(kind) == 0 .or. index(" "//kinds//" ", " "//kind//" ") == 0) return
    select case (kind)
    case ("U8", "I8")
      element_width = 1
    case ("F16", "BF16")
      element_width = 2
    case ("F32")
      element_width = 4
    end select
  end function element_width

  !> CRC-32 with zlib's polynomial
  pure integer(c_int32_t) function crc32(bytes)
    integer(c_int8_t), intent(in) :: bytes(:)
    integer(c_int32_t) :: table(0:255)
    integer(c_int64_t) :: i
    integer :: n, bit
    do n = 0, 255
      table(n) = n
      do bit = 1, 8
        table(n) = merge(ieor(ishft(table(n), -1), -306674912_c_int32_t), ishft(table(n), -1), btest(table(n), 0))
      end do
    end do
    crc32 = -1
    do i = 1, size(bytes, kind=c_int64_t)
      crc32 = ieor(ishft(crc32, -8), table(iand(ieor(crc32, int(bytes(i), c_int32_t)), 255_c_int32_t)))
    end do
    crc32 = not(crc32)
  end function crc32

  pure function lowercase(string) result(lower)
    character(len=*), intent(in) :: string
    character(len=len(string)) :: lower
    integer :: i
    lower = string
    do i = 1, len(string)
      if (string(i:i) >= "A" .and. string(i:i) <= "Z") lower(i:i) = achar(iachar(string(i:i)) + 32)
    end do
  end function lowercase
end module septet_tensor_file
