-- Counts an image that is about to be written, and takes the oldest ones off the index until the rest fits.
--
-- The index is one sorted set: a member for each image, its score the time when it was counted; and the member 'total',
-- with a score of minus the sum of their bytes, so that it always comes first. An image costs two commands here.
-- The bytes lie in keys of their own, which are not touched: the caller deletes those that are named.
--
-- An index of another type, which another program wrote, is renamed; an operator finds it there for a week.
--
-- KEYS    1 index; 2 its name after a rename
-- ARGV    1 member, which ends in ':' and the image's bytes; 2 those bytes; 3 now; 4 most bytes in all;
--         5 bytes to come down to when there are more; 6 end of the index in Unix ms; 7 '1' to set that end;
--         8 '1' to take images off also if the member is counted already
-- result  the members that were taken off
local index, member, size = KEYS[1], ARGV[1], tonumber(ARGV[2])
local added = redis.pcall('ZADD', index, ARGV[3], member)
if type(added) == 'table' then
  if not string.find(added.err, 'WRONGTYPE', 1, true) then return added end
  redis.call('RENAME', index, KEYS[2])
  redis.call('EXPIRE', KEYS[2], 604800)
  added = redis.call('ZADD', index, ARGV[3], member)
end
if added == 0 and ARGV[8] ~= '1' then return {} end
local total = -tonumber(redis.call('ZINCRBY', index, -size * added, 'total'))
if ARGV[7] == '1' or total == size then redis.call('PEXPIREAT', index, ARGV[6]) end
if total <= tonumber(ARGV[4]) then return {} end

local floor, freed, taken = math.max(tonumber(ARGV[5]), size), 0, {}
while total - freed > floor do
  local out = {}
  for _, oldest in ipairs(redis.call('ZRANGE', index, 1, 100)) do
    if total - freed <= floor then break end
    if oldest ~= member then
      out[#out + 1] = oldest
      local bytes = tonumber(string.match(oldest, '^[%w:]+:(%d+)$') or '')
      if bytes then freed, taken[#taken + 1] = freed + bytes, oldest end -- else it is no image
    end
  end
  if #out == 0 then break end
  redis.call('ZREM', index, unpack(out))
end
redis.call('ZINCRBY', index, freed, 'total')
return taken
